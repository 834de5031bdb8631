# SPDX-License-Identifier: Apache-2.0
"""Learn the row of a class that the table has none of, from the calls that its pipeline makes.

The pipeline runs a few steps with a stand-in for its transformer: once as asked, and once more for
each size with that size alone changed. What an input's dimensions do then names them; what changes
within a run says when it may change.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod, sqrt
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from torch.utils import _pytree as pytree

from ...bundle.streams import LATENTS
from ...core.errors import CheckpointError
from ...runtime.pipeline.call import SECONDS
from .prove import check_row
from .row import SIZES, Input, Row
from .watch import Sizes, WatchedRun, stand_in, usual_calls, watch

__all__ = ["learn_row", "watched_row"]

THOUSANDS = 10.0
"""Timesteps below are fractions of the schedule, or logarithms of noise."""

LATENT_NAMES = {"batch", "frames", "height", "width"}


def watched_row(model: str, config: Mapping[str, Any], pipeline: Path | None, text: str) -> Row:
    """Learn the row of a class by running the pipeline that it lies in, and prove it.

    Args:
        model: The transformer's class.
        config: Its config.
        pipeline: Folder of the diffusers pipeline; its other parts are loaded, its transformer is not.
        text: A prompt to run it with.

    Raises:
        CheckpointError: no pipeline lies there, or diffusers has no such class, or its calls can't be
            described by a row.
        RequestError: the pipeline can't be called with a prompt and a size.
        ExportError: the class can't be cut so, or the cut is not equal to it.
    """
    model_class = getattr(diffusers, model, None)
    if pipeline is None or model_class is None:
        raise CheckpointError(
            f"--trace-with, '{model}'",
            "is no class of diffusers"
            if pipeline
            else "lies in no diffusers pipeline to be watched in",
            "give the folder of a whole diffusers pipeline",
        )
    own = {name: value for name, value in config.items() if not name.startswith("_")}
    try:
        pipe = DiffusionPipeline.from_pretrained(pipeline, transformer=stand_in(model_class, own))
    except (OSError, ValueError, ImportError, AttributeError) as error:
        raise CheckpointError(
            str(pipeline), f"can't be loaded by diffusers: {error}", "give a whole pipeline"
        ) from error
    pipe.set_progress_bar_config(disable=True)
    row = learn_row(pipe, *usual_calls(pipe, text))
    check_row(row, model_class, own)
    return row


def learn_row(pipe: Any, first: Mapping[str, Any], others: Sizes) -> Row:
    """Learn a row from calls of a pipeline whose transformer is a `stand_in`.

    Args:
        pipe: A diffusers pipeline.
        first: What it is called with.
        others: What is changed for each size to differ.

    Raises:
        CheckpointError: the calls can't be described by a row; says by which argument.
        RequestError: the pipeline can't be called so.
    """
    config = dict(pipe.transformer.config)
    runs = {"": watch(pipe, first)} | {
        name: watch(pipe, {**first, **changed}) for name, changed in others.items()
    }
    return _Learner(pipe, config, first, runs).row()


def _follows(made: Tensor, timesteps: Tensor) -> bool:
    return torch.allclose(made, timesteps, rtol=1e-3, atol=1e-3)


@dataclass(frozen=True)
class _Factor:
    """A size divided by a number, as a row spells it, with its value in every run.

    ``rank`` is 0 for the likeliest divisor.
    """

    size: str
    by: int
    rank: int
    word: str
    extents: tuple[int, ...]


def _unlikeliness(factors: Sequence[_Factor]) -> tuple[int, int]:
    """Order products of equal value: a model divides a picture's sides alike, by its patch."""
    sides = {factor.by for factor in factors if factor.size in ("height", "width")}
    return len(sides), sum(factor.rank for factor in factors)


class _Learner:
    """Names dimensions by what they do from run to run."""

    def __init__(
        self,
        pipe: Any,
        config: dict[str, Any],
        asked: Mapping[str, Any],
        runs: dict[str, WatchedRun],
    ) -> None:
        self.pipe, self.config, self.asked, self.runs = pipe, config, asked, runs
        self.first = runs[""]
        self.known: dict[str, tuple[int, ...]] = {}
        self.scale, self.offset = 1.0, 0.0
        self.is_sound = "height" not in asked and any(key in asked for key in SECONDS)
        kinds = {path: self._changes(path) for path in self.first.leaves[0]}
        steps = [path for path, kind in kinds.items() if kind == "step"]
        if len(steps) != 1:
            raise self._unknown(
                self._name(steps[1]) if len(steps) > 1 else "latents",
                f"{len(steps)} inputs change at every step, one can",
            )
        self.kinds = kinds
        self.of: dict[tuple[Any, ...], tuple[str, ...]] = {}
        self._read_timesteps()
        self._name_sizes(steps[0])

    def row(self) -> Row:
        """Return the row."""
        inputs: dict[str, Any] = {}
        declared = {path: self._declared(path) for path in self.first.leaves[0]}
        for argument, value in self.first.arguments[0].items():
            _, structure = pytree.tree_flatten(value)
            own = [one for path, one in declared.items() if path[0].key == argument]
            inputs[argument] = pytree.tree_unflatten(own, structure)
        by_patch = "height" in self.known or self.is_sound
        scale = self._latent_scale()
        model = type(self.pipe.transformer).__name__
        return Row(
            model,
            inputs,
            pipelines=(type(self.pipe).__name__,),
            name=_family(model),
            multiples=self._multiples() if by_patch else {},
            latent_scale=scale,
            timestep_scale=self.scale,
            timestep_offset=self.offset,
            output_sign=-1 if self.first.turned else 1,
            packed=self._packed(scale),
        )

    def _changes(self, path: tuple[Any, ...]) -> str:
        """Say when a leaf changes; ``fixed`` is what is no input."""
        values = [call[path] for call in self.first.leaves]
        if not isinstance(values[0], Tensor):
            whole = isinstance(values[0], int) and not isinstance(values[0], bool)
            seen = {run.leaves[0][path] for run in self.runs.values()} if whole else {None}
            return "shape" if len(seen) > 1 else "fixed"
        if all(torch.equal(values[0], value) for value in values):
            return "prompt"
        if any(value.ndim == 0 or value.unique().numel() > 1 for value in values):
            return "step"
        return "run"

    def _read_timesteps(self) -> None:
        """Learn from which timesteps a run's inputs follow, and how: the step's own, or the next one's."""
        own = self.first.timesteps
        wanted = {LATENTS: own, "next": torch.cat([own[1:], own.new_zeros(1)])}
        given = {
            path: torch.stack([call[path].reshape(-1)[0].float() for call in self.first.leaves])
            for path, kind in self.kinds.items()
            if kind == "run"
        }
        for values in given.values():
            slope = float((own[0] - own[-1]) / (values[0] - values[-1]))
            scale = float(f"{slope:.3g}")
            offset = 0.0 if slope > 0 else float(f"{float(own[0] - slope * values[0]):.3g}")
            if _follows(values * scale + offset, own):
                self.scale, self.offset = scale, offset
        for path, values in given.items():
            made = values * self.scale + self.offset
            named = [name for name, timesteps in wanted.items() if _follows(made, timesteps)]
            if not named:
                raise self._unknown(
                    self._name(path), "doesn't follow from the scheduler's timesteps"
                )
            self.of[path] = (named[0],)

    def _extents(self, path: tuple[Any, ...]) -> list[tuple[int, ...]]:
        """Return each dimension's size in every run; of a whole number, itself."""
        found = [run.leaves[0][path] for run in self.runs.values()]
        shapes = [v.shape if isinstance(v, Tensor) else (v,) for v in found]
        if len({len(shape) for shape in shapes}) > 1:
            raise self._unknown(self._name(path), "has dimensions that come and go")
        return list(zip(*shapes, strict=True))

    def _moves(self, extents: tuple[int, ...]) -> frozenset[str]:
        """Return the sizes with which a dimension changes."""
        names = list(self.runs)
        return frozenset(
            n for n, extent in zip(names, extents, strict=True) if extent != extents[0]
        )

    def _name_sizes(self, latents: tuple[Any, ...]) -> None:
        """Name what the latents' dimensions are, then whole numbers, then the texts' lengths."""
        for extents in self._extents(latents):
            moves = self._moves(extents)
            if len(moves) == 1 and (name := next(iter(moves))) in LATENT_NAMES:
                self.known.setdefault(name, extents)
            elif moves and moves <= {"frames", "height", "width"}:
                self.known.setdefault("tokens", extents)
        by_token = "tokens" in self.known and "height" not in self.known
        for path in (p for p, kind in self.kinds.items() if kind == "shape"):
            ((extents,), moves) = self._extents(path), self._moves(self._extents(path)[0])
            if len(moves) == 1 and (name := next(iter(moves))) in LATENT_NAMES:
                named = {"height": "rows", "width": "columns"}.get(name, name)
                self.known.setdefault(named if by_token else name, extents)
        sides = [self.known[n] for n in ("frames", "rows", "columns") if n in self.known]
        if by_token and tuple(prod(x) for x in zip(*sides, strict=True)) == self.known["tokens"]:
            del self.known["tokens"]  # follows from them
        texts = [n for n in SIZES if n.startswith("text_tokens")]
        for path in (p for p, kind in self.kinds.items() if kind == "prompt"):
            for extents in self._extents(path):
                if self._moves(extents) == {"text_tokens"} and extents not in self.known.values():
                    if not texts:
                        raise self._unknown(self._name(path), "is one text too many")
                    self.known[texts.pop(0)] = extents

    def _word(self, extents: tuple[int, ...], where: tuple[Any, ...]) -> str:
        """Return a dimension as an expression over sizes."""
        if not self._moves(extents):
            keys = [k for k, v in self.config.items() if type(v) is int and v == extents[0]]
            return keys[0] if len(keys) == 1 and extents[0] > 4 else str(extents[0])
        beyond = ""
        for word, sizes in self._expressions():
            if sizes == extents:
                return word
            more = {own - size for own, size in zip(extents, sizes, strict=True)}
            if len(more) == 1 and word != "batch" and not beyond:  # so many tokens of its own
                beyond = f"{word}{more.pop():+d}"
        if beyond:
            return beyond
        raise self._unknown(
            self._name(where),
            f"has a dimension ({', '.join(map(str, extents))}) that no sizes tell",
        )

    def _expressions(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield expressions over the known sizes with their values, simple ones first."""
        yield from self.known.items()
        factors = self._factors()
        alone = {f.word: f.extents for options in factors for f in options}
        yield from alone.items()
        pixels = self._latent_scale()[1]
        for name in self.known.keys() & {"height", "width"}:
            yield f"{pixels}*{name}", tuple(pixels * x for x in self.known[name])
        products = dict(alone)
        for count in (2, 3):
            for several in itertools.combinations(factors, count):
                for chosen in sorted(itertools.product(*several), key=_unlikeliness):
                    extents = zip(*(f.extents for f in chosen), strict=True)
                    products["*".join(f.word for f in chosen)] = tuple(map(prod, extents))
        yield from products.items()
        texts = {n: s for n, s in self.known.items() if n.startswith("text")}
        images = {**products, **{n: s for n, s in self.known.items() if n == "tokens"}}
        for (text, first), (image, second) in itertools.product(texts.items(), images.items()):
            yield f"{text}+{image}", tuple(a + b for a, b in zip(first, second, strict=True))

    def _factors(self) -> list[list[_Factor]]:
        """Return each size divided by the patch that the config tells, undivided, and by a few numbers."""
        patches, found = self._multiples(), []
        for size, extents in self.known.items():
            if size not in SIZES or size.startswith(("text", "batch", "tokens")):
                continue
            key = patches.get(size, "1")
            patch = int(eval(key, {"__builtins__": {}}, dict(self.config)))
            numbers = {2: f"({size}//2)", 4: f"({size}//4)"}
            words = {patch: f"({size}//{key})", 1: size}
            words |= {by: word for by, word in numbers.items() if by != patch}
            found.append(
                [
                    _Factor(size, by, rank, word, tuple(x // by for x in extents))
                    for rank, (by, word) in enumerate(words.items())
                ]
            )
        return found

    def _declared(self, path: tuple[Any, ...]) -> Any:
        """Return the declaration of a leaf, or the value itself of what is no input."""
        kind, value = self.kinds[path], self.first.leaves[0][path]
        if kind == "fixed":
            return value
        words = [self._word(extents, path) for extents in self._extents(path)]
        if kind == "shape":
            return Input("shape", words[0], "int64")
        if value.is_complex():
            return Input("prompt", " ".join([*words, "2"]), pairs=True)
        shape = " ".join(words)
        low = kind == "run" or value.dtype in (torch.float16, torch.bfloat16)
        dtype = "float32" if low else str(value.dtype).removeprefix("torch.")
        of = self.of.get(path, (LATENTS,))
        return Input(kind, shape, dtype, self._fill(path, value, words), of=of)  # type: ignore[arg-type]  # what `_changes` says

    def _fill(self, path: tuple[Any, ...], value: Tensor, words: Sequence[str]) -> Any:
        """Return what to prove a cut with in an input's place."""
        if self.kinds[path] == "run":
            return "fraction" if float(value.abs().max()) < THOUSANDS else "timestep"
        if self.kinds[path] == "step":
            return "normal"
        whole = bool((value == value.round()).all()) if value.is_floating_point() else True
        if "mask" in self._name(path) and whole and bool(((value == 0) | (value == 1)).all()):
            return "mask"
        if whole and words[-1] in ("3", "4"):
            return "positions"
        return int(value.max()) + 1 if whole and bool(value.any()) else "normal"

    def _latent_scale(self) -> tuple[int, int]:
        """Return frames and pixels per latent, as the pipeline has them."""
        pipe = self.pipe
        frames = getattr(pipe, "vae_scale_factor_temporal", None)
        pixels = [getattr(pipe, k, None) for k in ("vae_scale_factor_spatial", "vae_scale_factor")]
        usual = Row("", {}).latent_scale
        moving = "frames" in self.runs
        if self.is_sound:
            return 1, 1
        return (frames or usual[0]) if moving else 1, next((p for p in pixels if p), usual[1])

    def _packed(self, scale: tuple[int, int]) -> int:
        """Return latent rows in a token; 0 where latents don't come as tokens."""
        if "height" in self.known or "frames" in self.runs:
            return 0
        known = {n: sizes[0] for n, sizes in self.known.items()}
        if not {"tokens", "rows"} & known.keys():
            return 0
        tokens = known["rows"] * known["columns"] if "rows" in known else known["tokens"]
        latents: float = self.asked["height"] * self.asked["width"] / scale[1] ** 2
        return max(1, round(sqrt(latents / tokens)))

    def _multiples(self) -> dict[str, str]:
        """Return patches, by the keys that configs have for them."""
        found: dict[str, str] = {}
        patch = self.config.get("patch_size")
        if isinstance(patch, int) and self.is_sound:
            found["frames"] = "patch_size"
        elif isinstance(patch, int):
            found |= {"height": "patch_size", "width": "patch_size"}
        elif isinstance(patch, (list, tuple)):
            names = ("frames", "height", "width")[-len(patch) :]
            found |= {name: f"patch_size[{i}]" for i, name in enumerate(names)}
        if self.config.get("patch_size_t"):
            found["frames"] = "patch_size_t"
        return {name: key for name, key in found.items() if name in self.known}

    def _name(self, path: tuple[Any, ...]) -> str:
        return ".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path)

    def _unknown(self, name: str, what: str) -> CheckpointError:
        return CheckpointError(
            f"{type(self.pipe.transformer).__name__}, '{name}'",
            what,
            "write a row for the model (docs/how-to/add-a-family.md)",
        )


def _family(model: str) -> str:
    """Return what a class's bundles call their model."""
    (own,) = re.findall(r"^(.+?)(?:DiT)?(?:\dD)?(?:Transformer|Model|$)", model)
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", own.replace("DiT", "Dit")).lower()
