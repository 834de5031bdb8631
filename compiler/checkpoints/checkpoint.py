# SPDX-License-Identifier: Apache-2.0
"""Find a diffusers checkpoint: on disk or on the hub, whole or sharded, never loading a tensor."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...bundle.safetensors_header import StoredTensor, read_header
from ...core.errors import CheckpointError, nearest
from .completeness import check_quantization
from .layouts import file_fault, folder_fault, original_fault, weights_fault

__all__ = ["Checkpoint", "open_checkpoint", "read_config", "read_json", "read_tensors"]

WEIGHTS_STEM = "diffusion_pytorch_model"
SECOND = "transformer_2"
"""Where a pipeline has the transformer of the low noise levels, if that is another one."""


@dataclass(frozen=True)
class Checkpoint:
    """A transformer's config and where its tensors lie.

    Attributes:
        source: What the user gave: a folder or a hub id.
        revision: Commit of a hub checkpoint.
        pipeline: Folder with ``model_index.json``, or None when a bare transformer was given.
        transformer: Folder with the transformer's ``config.json``.
        config: That config.
        tensors: Tensor name → place, from the headers; an expert's names begin with its part's.
        experts: The pipeline's transformers by falling noise level, and the fraction of the
            training timesteps from which on each denoises; empty where there is one.
    """

    source: str
    revision: str | None
    pipeline: Path | None
    transformer: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    experts: tuple[tuple[str, float], ...] = ()

    @property
    def transformer_class(self) -> str:
        """Diffusers class of the transformer."""
        return str(self.config.get("_class_name", ""))

    def of_part(self, part: str) -> dict[str, StoredTensor]:
        """Return the tensors of one of the pipeline's transformers, by its own names."""
        second = f"{SECOND}."
        if part == SECOND:
            return {
                n.removeprefix(second): t for n, t in self.tensors.items() if n.startswith(second)
            }
        return {n: t for n, t in self.tensors.items() if not n.startswith(second)}


def open_checkpoint(model: str, revision: str | None = None) -> Checkpoint:
    """Open ``model``: a diffusers pipeline folder, a transformer folder, or a hub id.

    Raises:
        CheckpointError: nothing there, another layout, no config, a missing or truncated shard,
            quantised weights, or experts that differ in more than their weights.
    """
    folder = Path(model).expanduser()
    if folder.is_file():
        raise file_fault(folder)
    if not folder.exists():
        _check_is_hub_id(model)
        folder, revision = _download(model, revision)
    pipeline = folder if (folder / "model_index.json").is_file() else None
    if pipeline is None and not (folder / "config.json").is_file():
        raise folder_fault(folder)
    transformer = folder / "transformer" if pipeline else folder
    config = read_config(transformer)
    tensors = read_tensors(transformer)
    experts: tuple[tuple[str, float], ...] = ()
    index = read_json(pipeline / "model_index.json") if pipeline else {}
    boundary = index.get("boundary_ratio")
    if pipeline is not None and boundary is not None and index.get(SECOND, [None])[0] is not None:
        other = read_config(pipeline / SECOND)
        if _geometry(other) != _geometry(config):
            raise CheckpointError(
                f"{pipeline / SECOND}/config.json", "differs from the first transformer's",
                "build each transformer's folder by itself",
            )  # fmt: skip
        tensors |= {f"{SECOND}.{n}": t for n, t in read_tensors(pipeline / SECOND).items()}
        experts = (("transformer", float(boundary)), (SECOND, 0.0))
    return Checkpoint(model, revision, pipeline, transformer, config, tensors, experts)


def read_tensors(folder: Path, stem: str = WEIGHTS_STEM) -> dict[str, StoredTensor]:
    """Return the tensors of a part's folder from its files' headers.

    Args:
        folder: Holds one file or shards with their index.
        stem: What the files' names begin with.

    Raises:
        CheckpointError: there are none in this layout, or a file is missing or truncated.
    """
    tensors: dict[str, StoredTensor] = {}
    for shard in _shards(folder, stem):
        tensors |= read_header(shard)
    return tensors


def read_config(folder: Path) -> dict[str, Any]:
    """Read a transformer's config, refusing what is not diffusers' or names a quantisation."""
    path = folder / "config.json"
    original = original_fault(path)
    if original is not None:
        raise original
    config = read_json(path)
    check_quantization(config, path)
    return config


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
        model, "there is no such folder or file",
        f"in '{path.parent}': {nearest(path.name, beside)}" if beside
        else "check the path; a hub id has the form 'Wan-AI/Wan2.1-T2V-1.3B-Diffusers'",
    )  # fmt: skip


def _download(model: str, revision: str | None) -> tuple[Path, str | None]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    hint = "give a diffusers folder, or a hub id such as 'Wan-AI/Wan2.1-T2V-1.3B-Diffusers'"
    try:
        path = snapshot_download(
            model,
            revision=revision,
            allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"],
        )
    except HFValidationError as error:
        raise CheckpointError(model, "is neither a folder nor a hub id", hint) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            model, f"is no folder here, and can't be had from the hub: {reason}", hint
        ) from error
    return Path(path), Path(path).name


def read_json(path: Path) -> dict[str, Any]:
    """Read one of a checkpoint's JSON files.

    Raises:
        CheckpointError: it can't be read, or is not a JSON object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            str(path), f"can't be read: {error.strerror}", "give a checkpoint in diffusers layout"
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(str(path), f"is not JSON: {error}", "fetch the file again") from error
    if not isinstance(data, dict):
        raise CheckpointError(str(path), "is not a JSON object", "fetch the file again")
    return data


def _shards(folder: Path, stem: str) -> list[Path]:
    index = folder / f"{stem}.safetensors.index.json"
    single = folder / f"{stem}.safetensors"
    if single.is_file() and not index.is_file():
        return [single]
    if not index.is_file():
        raise weights_fault(folder, stem)
    weight_map = read_json(index).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    odd = [n for n in names if not isinstance(n, str) or Path(n).name != n]
    if odd or not names:
        found = f"names shards outside its folder: {odd[0]!r}" if odd else "names no shards"
        raise CheckpointError(str(index), found, "fetch the file again")
    shards = [folder / name for name in sorted(set(names))]
    missing = [s.name for s in shards if not s.is_file()]
    if missing:
        raise CheckpointError(
            str(folder),
            f"{len(missing)} of {len(shards)} weight shards are missing: {', '.join(missing)}",
            "fetch them into the folder",
        )
    return shards
