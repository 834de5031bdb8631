# SPDX-License-Identifier: Apache-2.0
"""A row of the table of models: what a diffusers transformer takes, and when each input may change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import sympy
import torch
from torch.utils._sympy.functions import FloorDiv

from ...bundle.streams import LATENTS
from .patch import Patch

__all__ = [
    "PATCH_IMAGE",
    "PATCH_VIDEO",
    "SIZES",
    "TEXT_MASK",
    "Changes",
    "Ignored",
    "Input",
    "OfConfig",
    "Row",
    "Same",
    "prompt",
    "run",
    "size",
    "size_expression",
    "step",
]

Changes = Literal["step", "run", "prompt", "shape"]
"""When an input may change: at every step (latents), with the timestep, with the prompt, or with
the sizes of a run."""

Fill = Literal["normal", "mask", "positions", "places", "timestep", "fraction"] | int
"""Values to prove a cut with: normal, a prefix of ones, grid positions, each place of a sequence once, a
timestep of 0 … 1,000 or of 0 … 1, below a number."""

SIZES = {
    "batch": 2, "frames": 3, "height": 5, "width": 7, "tokens": 13, "text_tokens": 11,
    "text_tokens_2": 8, "image_tokens": 6, "audio_tokens": 9, "rows": 4, "columns": 12,
}  # fmt: skip
"""Dimensions that differ from run to run, and the sizes to trace with: no two of them equal."""


@dataclass(frozen=True)
class Input:
    """One argument, or one leaf of a nested argument, of a transformer's `forward`.

    Attributes:
        changes: When it may change.
        shape: Dimensions, apart by spaces: expressions over `SIZES` and the model's config, and
            the `len` of its lists. Of a whole number that follows from a run's sizes
            (``changes="shape"``): its value.
        dtype: As torch names it.
        fill: Values to prove a cut with.
        needs: Config key without which the model takes no such input.
        listed: Whether `forward` takes a list with a tensor for each element of the first dimension.
        pairs: Whether `forward` takes complex numbers, whose real and imaginary parts are the last
            dimension's two.
        of: Of a timestep: whose it is, that of ``latents`` or that of the ``next`` step; of a vector of
            them: whose each is, latents by the bundle's names.
        indices: Of a vector of timesteps: the argument that says which each token has.
        behind: Of places: how many others lie before them in the sequence, as ``shape`` spells sizes.
        over: Argument, and a dimension of it, over which a timestep is repeated: pipelines give each
            frame the same.
    """

    changes: Changes
    shape: str
    dtype: str = "float32"
    fill: Fill = "normal"
    needs: str | None = None
    listed: bool = False
    pairs: bool = False
    of: tuple[str, ...] = (LATENTS,)
    over: tuple[str, int] | None = None
    indices: str | None = None
    behind: str = "0"

    def argument(self, value: Any) -> Any:
        """Return what `forward` takes where a cut takes a tensor, or a whole number."""
        if self.pairs:
            return torch.view_as_complex(value)
        return list(value.unbind(0)) if self.listed else value

    def dimensions(self, config: Mapping[str, Any], sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Return the shape at given sizes; of a whole number, its value alone."""
        names = {**config, **sizes}
        known = {"__builtins__": {}, "len": len}
        return tuple(eval(word, known, names) for word in self.shape.split())

    def with_fixed(self, fixed: Mapping[str, str]) -> Input:
        """Return the input with numbers in place of some sizes."""
        words = (fixed.get(word, word) for word in self.shape.split())
        return replace(self, shape=" ".join(words))

    def dynamic(self) -> tuple[int, ...]:
        """Return which dimensions differ from run to run."""
        words = (compile(word, word, "eval").co_names for word in self.shape.split())
        return tuple(i for i, names in enumerate(words) if SIZES.keys() & set(names))


@dataclass(frozen=True)
class Same:
    """An argument of `forward` that pipelines give what they give another.

    Attributes:
        argument: The other.
    """

    argument: str


@dataclass(frozen=True)
class Ignored:
    """An argument of `forward` that pipelines give, and that changes nothing whatever it is.

    Nothing reads it where the row's other arguments are given.
    """


@dataclass(frozen=True)
class OfConfig:
    """A whole number that pipelines give `forward`, and that follows from the model's config.

    Attributes:
        value: An expression over the config.
    """

    value: str

    def number(self, config: Mapping[str, Any]) -> int:
        """Return the number."""
        return int(sympy.sympify(self.value, locals=_numbers(config)))


def size_expression(word: str, config: Mapping[str, Any]) -> Any:
    """Return a dimension that a row spells (``height // patch_size``) over the names of `SIZES`."""
    plain = {name: sympy.Symbol(name, integer=True, positive=True) for name in SIZES}
    return sympy.sympify(word, locals={**_numbers(config), **plain}).replace(
        sympy.floor, lambda ratio: FloorDiv(*ratio.as_numer_denom())
    )


def _numbers(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if isinstance(value, (int, list, tuple))}


def step(shape: str, **options: Any) -> Input:
    """Return an input that changes at every step."""
    return Input("step", shape, **options)


def run(shape: str = "batch", **options: Any) -> Input:
    """Return a timestep: its values of all steps are known before the first."""
    return Input("run", shape, **{"fill": "timestep", **options})


def prompt(shape: str, **options: Any) -> Input:
    """Return an input that changes with the prompt."""
    return Input("prompt", shape, **options)


def size(value: str) -> Input:
    """Return a whole number that follows from a run's sizes."""
    return Input("shape", value, "int64")


@dataclass(frozen=True)
class Row:
    """One transformer class of diffusers.

    Attributes:
        model: Name of the class.
        name: What manifests call the model's family; empty where no bundle is made by the row.
        inputs: Argument of `forward` → `Input`, a nested list or tuple of them, `Same`, `Ignored`,
            or a plain value, the one that pipelines may give, or `OfConfig`. The first input that changes at every
            step is the one whose stream policies look at.
        pipelines: Diffusers pipelines whose ``transformer`` it may be.
        multiples: Size → expression over the config of which it is a multiple (a patch).
        whole: Whether blocks must all be traced, because `forward` tells them apart by index.
        latent_scale: Frames and pixels per latent, where the VAE's config does not tell.
        signals: Signal that policies may look at, beside those of every model → path of the
            module that makes it, of timesteps alone.
        timestep_scale: Brings the timesteps that a pipeline hands in to the scheduler's: multiplied
        timestep_offset: and then added.
        scheduler: Class of its pipelines' scheduler where that is not one of a flow model.
        output_sign: -1 where the pipeline turns the model output round before the scheduler has it.
        packed: Latent rows and columns in a token, where latents come as tokens; else 0.
        fixed: Size → config key with which `forward` takes one value of it alone, and the value.
        usual: Size that neither pixels nor a config's text length tell → what it usually is.
        patches: What is traced in place of lines that can't be.
        refused: Config key with which a model is of another kind → its value (None: any but none),
            what kind, and what to use.
    """

    model: str
    inputs: Mapping[str, Any]
    pipelines: tuple[str, ...] = ()
    name: str = ""
    multiples: Mapping[str, str] = field(default_factory=dict)
    whole: bool = False
    latent_scale: tuple[int, int] = (4, 8)
    signals: Mapping[str, str] = field(default_factory=dict)
    timestep_scale: float = 1.0
    timestep_offset: float = 0.0
    output_sign: int = 1
    scheduler: str = ""
    packed: int = 0
    fixed: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    usual: Mapping[str, int] = field(default_factory=dict)
    patches: tuple[Patch, ...] = ()
    refused: Mapping[str, tuple[Any, str, str]] = field(default_factory=dict)

    def __hash__(self) -> int:
        """Tell rows apart by all that they say."""
        return hash(repr(self))

    def sizes(self, config: Mapping[str, Any], counts: Mapping[str, int] = SIZES) -> dict[str, int]:
        """Return sizes that the model takes: ``counts`` of its patches in each dimension."""
        patches = {
            n: eval(e, {"__builtins__": {}}, dict(config)) for n, e in self.multiples.items()
        }
        return {name: count * patches.get(name, 1) for name, count in counts.items()}


PATCH_VIDEO = {"frames": "patch_size[0]", "height": "patch_size[1]", "width": "patch_size[2]"}
PATCH_IMAGE = {"height": "patch_size", "width": "patch_size"}

TEXT_MASK = prompt("batch text_tokens", fill="mask")
