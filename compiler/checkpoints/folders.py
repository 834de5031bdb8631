# SPDX-License-Identifier: Apache-2.0
"""Read a part's folder in diffusers layout: its JSON, and the headers of its weights, whole or sharded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...bundle.safetensors_header import StoredTensor, read_header
from ...core.errors import CheckpointError
from .completeness import check_quantization
from .layouts import weights_fault

__all__ = [
    "WEIGHTS_STEM",
    "has_variant",
    "linked_names",
    "pipeline_folders",
    "plain_name",
    "read_config",
    "read_json",
    "read_tensors",
]

WEIGHTS_STEM = "diffusion_pytorch_model"
TRANSFORMERS = ("transformer", "transformer_2")


def read_tensors(
    folder: Path, stem: str = WEIGHTS_STEM, variant: str | None = None
) -> dict[str, StoredTensor]:
    """Return the tensors of a part's folder from its files' headers.

    Args:
        folder: Holds one file or shards with their index.
        stem: What the files' names begin with.
        variant: Which of several sets of weights, as ``fp16``; None takes the plain one.

    Raises:
        CheckpointError: there are none in this layout, or a file is missing or truncated.
    """
    tensors: dict[str, StoredTensor] = {}
    for shard in _shards(folder, stem, variant):
        tensors |= read_header(shard)
    return tensors


def has_variant(folder: Path, variant: str) -> bool:
    """Ask whether a part has weights of a variant; diffusers takes the plain ones where it has none."""
    return any(folder.glob(f"*.{variant}.safetensors")) or any(
        folder.glob(f"*.safetensors.index.{variant}.json")
    )


def linked_names(folder: Path, variant: str | None = None) -> dict[Path, str]:
    """Return every file below a part's folder that a bundle takes, with its name there.

    Of a part that has ``variant``, the variant's weights get the plain names, and others stay away;
    shards keep theirs, by which their index calls them.
    """
    names = {
        p: p.relative_to(folder).as_posix() for p in sorted(folder.glob("**/*")) if p.is_file()
    }
    if variant is None or not has_variant(folder, variant):
        return names
    chosen = {p: n for p, n in names.items() if ".safetensors" not in p.name}
    for path, name in names.items():
        if name.endswith(f".{variant}.safetensors"):
            chosen[path] = plain_name(name, variant)
        elif name.endswith(f".safetensors.index.{variant}.json"):
            chosen[path] = name.removesuffix(f".{variant}.json") + ".json"
            weight_map = read_json(path).get("weight_map")
            shards = set(weight_map.values()) if isinstance(weight_map, dict) else set()
            chosen |= {p: n for p, n in names.items() if n in shards}
    return chosen


def pipeline_folders(pipeline: Path) -> list[str]:
    """Return the parts of a pipeline that have a folder, its transformers aside."""
    index = read_json(pipeline / "model_index.json")
    return [
        part
        for part, told in index.items()
        if isinstance(told, list)
        and part not in TRANSFORMERS
        and part.isidentifier()
        and (pipeline / part).is_dir()
    ]


def plain_name(name: str, variant: str | None) -> str:
    """Return the name of a weight file without its variant; that of a shard as it is."""
    suffix = f".{variant}.safetensors"
    return name.removesuffix(suffix) + ".safetensors" if name.endswith(suffix) else name


def read_config(path: Path) -> dict[str, Any]:
    """Read a transformer's config, refusing one that names a quantisation."""
    config = read_json(path)
    check_quantization(config, path)
    return config


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


def _shards(folder: Path, stem: str, variant: str | None) -> list[Path]:
    infix = "" if variant is None else f".{variant}"
    index = folder / f"{stem}.safetensors.index{infix}.json"
    single = folder / f"{stem}{infix}.safetensors"
    if single.is_file() and not index.is_file():
        return [single]
    if not index.is_file():
        raise weights_fault(folder, stem, variant)
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
