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

__all__ = ["WEIGHTS_STEM", "read_config", "read_json", "read_tensors"]

WEIGHTS_STEM = "diffusion_pytorch_model"


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
