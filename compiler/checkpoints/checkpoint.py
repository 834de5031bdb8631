# SPDX-License-Identifier: Apache-2.0
"""Find a checkpoint: a diffusers folder, a single file or a hub id, never loading a tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ...bundle.safetensors_header import read_header
from ...core.errors import CheckpointError, nearest
from .folders import read_config, read_json, read_tensors
from .gguf_file import read_gguf
from .layouts import file_fault, folder_fault
from .original import ORIGINAL_CONFIGS, original_transformer
from .scaled import keep_float8, tell_of_scales, without_scales
from .sources import Weight

__all__ = ["Checkpoint", "Float8", "expert_prefixes", "open_checkpoint"]

Float8 = Literal["keep", "convert"]

SECOND = "transformer_2"
"""Where a pipeline has the transformer of the low noise levels, if that is another one."""

DOWNLOADED = ["*.json", "*.safetensors", "*.txt", "*.model"]


@dataclass(frozen=True)
class Checkpoint:
    """A transformer's config and where its tensors lie.

    Attributes:
        source: What the user gave: a folder, a file or a hub id.
        revision: Commit of a hub checkpoint.
        pipeline: Folder with ``model_index.json``, or None when a bare transformer was given.
        transformer: Folder or file of the transformer's weights.
        config: Its config, as diffusers' class takes it.
        tensors: diffusers' name of a tensor → its place, or what it is made of; an expert's names
            begin with its part's.
        experts: The pipeline's transformers by falling noise level, and the fraction of the
            training timesteps from which on each denoises; empty where there is one.
        second: Folder or file of the second expert's weights.
        notes: What a user should know of how the weights were read, one sentence each.
        variant: Which of several sets of weights the pipeline's other parts are taken in, where
            they have it.
    """

    source: str
    revision: str | None
    pipeline: Path | None
    transformer: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Weight]
    experts: tuple[tuple[str, float], ...] = ()
    second: Path | None = None
    notes: tuple[str, ...] = ()
    variant: str | None = None

    @property
    def transformer_class(self) -> str:
        """Diffusers class of the transformer."""
        return str(self.config.get("_class_name", ""))

    def of_part(self, part: str) -> dict[str, Weight]:
        """Return the tensors of one of the pipeline's transformers, by its own names."""
        second = f"{SECOND}."
        if part == SECOND:
            return {
                n.removeprefix(second): t for n, t in self.tensors.items() if n.startswith(second)
            }
        return {n: t for n, t in self.tensors.items() if not n.startswith(second)}

    def place_of(self, part: str) -> Path:
        """Return the folder or file of one of the pipeline's transformers."""
        return self.second if part == SECOND and self.second is not None else self.transformer


def open_checkpoint(
    model: str,
    revision: str | None = None,
    *,
    pipeline: str | None = None,
    low_noise: str | None = None,
    variant: str | None = None,
    float8: Float8 = "convert",
) -> Checkpoint:
    """Open ``model``: a pipeline's folder, a transformer's folder or single file, or a hub id.

    Args:
        model: Weights in diffusers layout or in their authors' (`original_transformer`).
        revision: Commit, if ``model`` is a hub id.
        pipeline: For a transformer alone: the pipeline's folder or hub id, which has the
            transformer's config and the other parts; the transformer's weights may lack there.
        low_noise: Folder or file of the second expert, where ``model`` is the first one alone.
        variant: Which of several sets of weights a folder has, as ``fp16``.
        float8: Whether weights in float8 stay so, each with its scale beside it.

    Raises:
        CheckpointError: nothing there, an unknown layout, no config, a missing or truncated shard,
            quantised weights, experts that differ in more than their weights, or one without the other.
    """
    place, revision = _locate(model, revision)
    whole = place if (place / "model_index.json").is_file() else None
    parts = _pipeline(model, whole, pipeline)
    index = read_json(parts / "model_index.json") if parts else {}
    if index.get("expand_timesteps") and "ImageToVideo" in str(index.get("_class_name")):
        raise CheckpointError(
            f"{parts}/model_index.json, 'expand_timesteps'",
            "gives the first frame's tokens a timestep of their own, and a cut model has one per step",
            "build text-to-video of this checkpoint (its WanPipeline), or an A14B image-to-video one",
        )
    boundary = index.get("boundary_ratio")
    has_second = boundary is not None and index.get(SECOND, [None])[0] is not None
    _check_experts(model, whole, parts if has_second else None, low_noise)
    first = _read(whole / "transformer" if whole else place, parts, "transformer", variant)
    second = None
    if has_second:
        other = whole / SECOND if whole else _locate(str(low_noise), None)[0]
        second = _read(other, parts, SECOND, variant)
    tensors: Mapping[str, Weight] = first.tensors
    notes = first.notes
    experts: tuple[tuple[str, float], ...] = ()
    if second is not None:
        if _geometry(second.config) != _geometry(first.config):
            where = f"{second.place}/config.json" if second.place.is_dir() else str(second.place)
            raise CheckpointError(
                where,
                "differs from the first transformer's",
                "build each transformer's folder by itself",
            )
        tensors = {**tensors, **{f"{SECOND}.{n}": t for n, t in second.tensors.items()}}
        experts = (("transformer", float(boundary)), (SECOND, 0.0))  # type: ignore[arg-type]
        notes = tuple(dict.fromkeys((*notes, *second.notes)))
    if float8 == "keep":
        tensors = keep_float8(tensors, f"{SECOND}.")
    notes = (*notes, *tell_of_scales(tensors))
    return Checkpoint(
        model,
        revision,
        parts,
        first.place,
        first.config,
        tensors,
        experts,
        second.place if second else None,
        notes,
        variant,
    )


def expert_prefixes(checkpoint: Checkpoint) -> list[str]:
    """Return what the names of each expert's weights begin with; of one transformer, nothing."""
    return ["", *(f"{part}." for part, _ in checkpoint.experts[1:])]


def _check_experts(
    model: str, whole: Path | None, of_two: Path | None, low_noise: str | None
) -> None:
    """Refuse one expert without the other, or a third; ``of_two`` is a pipeline that has two."""
    if whole and low_noise:
        raise CheckpointError(
            "--low-noise-model",
            f"'{model}' is a pipeline's folder, which has its own transformers",
            "leave it out, or give the first transformer's file or folder as MODEL",
        )
    if of_two and not whole and not low_noise:
        raise CheckpointError(
            model,
            f"is one transformer, and the pipeline '{of_two}' has two",
            "give the one of the low noise levels too, by --low-noise-model",
        )
    if low_noise and not of_two:
        raise CheckpointError(
            "--low-noise-model",
            "no pipeline says from which noise level on it denoises",
            "give --pipeline, a folder whose model_index.json has 'transformer_2' and "
            "'boundary_ratio'; or build each transformer by itself",
        )


@dataclass(frozen=True)
class _Transformer:
    """One transformer's weights, its config, and notes for people."""

    place: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Weight]
    notes: tuple[str, ...] = ()


def _read(place: Path, pipeline: Path | None, part: str, variant: str | None) -> _Transformer:
    """Read one transformer from a folder or file; its config is there, or the pipeline has it."""
    beside = pipeline / part / "config.json" if pipeline else None
    if place.is_file():
        _check_no_variant(place, variant, pipeline)
        config = beside if beside and beside.is_file() else _config_beside(place)
        stored, scaled = _read_file(place)
        tensors, found, notes = original_transformer(
            stored, place, read_config(config) if config else None
        )
        return _Transformer(place, found, tensors, (*notes, *scaled))
    own = place / "config.json"
    if not own.is_file() and beside is not None and beside.is_file():
        own = beside
    elif not own.is_file() and (pipeline is None or pipeline / part != place):
        raise folder_fault(place)
    config_of = read_config(own)
    stored, scaled = without_scales(read_tensors(place, variant=variant), place)
    if config_of.get("_class_name") not in ORIGINAL_CONFIGS:
        return _Transformer(place, config_of, stored, scaled)
    theirs = read_config(beside) if beside is not None and beside.is_file() else config_of
    tensors, found, notes = original_transformer(stored, place, theirs)
    return _Transformer(place, found, tensors, (*notes, *scaled))


def _check_no_variant(file: Path, variant: str | None, pipeline: Path | None) -> None:
    if variant is not None and pipeline is None:
        raise CheckpointError(
            f"--variant {variant}",
            f"means a folder's weights, and '{file}' is a file",
            "leave it out, or give the folder",
        )


def _read_file(file: Path) -> tuple[Mapping[str, Weight], tuple[str, ...]]:
    """Return the tensors of a single file, by the names that it has, and notes for people."""
    if file.suffix.lower() == ".safetensors":
        return without_scales(read_header(file), file)
    if file.suffix.lower() == ".gguf":
        return read_gguf(file)
    raise file_fault(file)


def _config_beside(file: Path) -> Path | None:
    """Return the ``config.json`` in a file's folder, if it is of a model's class."""
    path = file.parent / "config.json"
    return path if path.is_file() and "_class_name" in read_json(path) else None


def _pipeline(model: str, whole: Path | None, pipeline: str | None) -> Path | None:
    """Return the folder of the pipeline's other parts."""
    if pipeline is None:
        return whole
    if whole is not None:
        raise CheckpointError(
            "--pipeline",
            f"'{model}' is a pipeline's folder itself",
            "leave it out, or give a transformer's file or folder as MODEL",
        )
    folder, _ = _locate(pipeline, None, ignore=["transformer*/*.safetensors"])
    if not (folder / "model_index.json").is_file():
        raise CheckpointError(
            f"--pipeline {pipeline}",
            "has no 'model_index.json'",
            "give the folder or hub id of a diffusers pipeline",
        )
    return folder


def _locate(
    model: str, revision: str | None, ignore: list[str] | None = None
) -> tuple[Path, str | None]:
    """Return the file or folder of a path or hub id, and the commit of the latter."""
    place = Path(model).expanduser()
    if place.exists():
        return place, revision
    _check_is_hub_id(model)
    return _download(model, revision, ignore)


def _geometry(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config without what diffusers notes about its origin."""
    return {n: value for n, value in config.items() if not n.startswith("_")}


def _check_is_hub_id(model: str) -> None:
    """Refuse a path that leads nowhere: looking it up on the hub would tell nothing."""
    is_path = model.startswith((".", "/", "~")) or model.endswith("/") or model.count("/") > 1
    is_path |= "/" in model and Path(model).parent.is_dir()
    if not is_path:
        return
    path = Path(model).expanduser()
    beside = sorted(p.name for p in path.parent.glob("*/")) if path.parent.is_dir() else []
    raise CheckpointError(
        model,
        "there is no such folder or file",
        f"in '{path.parent}': {nearest(path.name, beside)}"
        if beside
        else "check the path; a hub id has the form 'Wan-AI/Wan2.1-T2V-1.3B-Diffusers'",
    )


def _download(
    model: str, revision: str | None, ignore: list[str] | None
) -> tuple[Path, str | None]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    hint = "give a diffusers folder, or a hub id such as 'Wan-AI/Wan2.1-T2V-1.3B-Diffusers'"
    try:
        path = snapshot_download(
            model, revision=revision, allow_patterns=DOWNLOADED, ignore_patterns=ignore
        )
    except HFValidationError as error:
        raise CheckpointError(model, "is neither a folder nor a hub id", hint) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            model, f"is no folder here, and can't be had from the hub: {reason}", hint
        ) from error
    return Path(path), Path(path).name
