# SPDX-License-Identifier: Apache-2.0
"""Read and write safetensors headers, so that tensors can be referenced by offset or streamed.

The library reads whole tensors; a bundle also needs to know where they lie in a file. Format:
eight bytes of header length (little endian), a JSON header, the data.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from ..core.dtypes import ITEM_BYTES, SAFETENSORS_DTYPES
from ..core.errors import CheckpointError
from ..core.strict_json import parse_json

__all__ = ["StoredTensor", "encode_header", "read_header"]

MAX_HEADER_BYTES = 100 << 20
MAX_RANK = 8
ALIGNMENT_BYTES = 64


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a safetensors file, there called ``name``: ``bytes`` from ``offset`` of it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    bytes: int
    name: str


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Return every tensor of a file, checked against the file's size.

    Raises:
        CheckpointError: the file is missing, truncated, or not safetensors.
    """
    where = str(path)
    fix = "fetch the file again"
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else MAX_HEADER_BYTES + 1
            if length > min(MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(where, f"is truncated or not safetensors ({size} bytes)", fix)
            header = parse_json(stream.read(length))
    except OSError as error:
        raise CheckpointError(where, f"can't be read: {error.strerror}", fix) from error
    except ValueError as error:
        raise CheckpointError(where, f"has a header that is not JSON: {error}", fix) from error
    if not isinstance(header, dict):
        raise CheckpointError(where, "has a header that is not a table of tensors", fix)
    header.pop("__metadata__", None)
    tensors = {n: _entry(path, n, e, 8 + length) for n, e in header.items()}
    end = max((t.offset + t.bytes for t in tensors.values()), default=8 + length)
    if end != size:
        raise CheckpointError(where, f"has {size} bytes, its header says {end}: truncated", fix)
    return tensors


def _entry(path: Path, name: str, entry: Mapping[str, Any], data: int) -> StoredTensor:
    try:
        dtype = SAFETENSORS_DTYPES[str(entry["dtype"])]
        shape, (begin, end) = tuple(entry["shape"]), entry["data_offsets"]
        if len(shape) > MAX_RANK or not all(
            type(n) is int and n >= 0 for n in (*shape, begin, end)
        ):
            raise ValueError(f"sizes {list(shape[:MAX_RANK])}, offsets {begin}, {end}")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}, tensor '{name}'",
            f"has an unusable header entry: {error}",
            "fetch the file again",
        ) from error
    if end - begin != prod(shape) * ITEM_BYTES[dtype]:
        raise CheckpointError(
            f"{path}, tensor '{name}'", "has a size that its shape denies", "fetch the file again"
        )
    return StoredTensor(path, dtype, shape, data + begin, end - begin, name)


def encode_header(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
) -> tuple[bytes, dict[str, int]]:
    """Encode the header of a file to be written.

    Args:
        tensors: Name → (dtype, shape), in the order in which data will be written.

    Returns:
        The file's first bytes, aligned to 64, and each tensor's absolute offset.
    """
    spelled = {ours: theirs for theirs, ours in SAFETENSORS_DTYPES.items()}
    header: dict[str, Any] = {}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        size = prod(shape) * ITEM_BYTES[dtype]
        header[name] = {
            "dtype": spelled[dtype],
            "shape": list(shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT_BYTES)
    start = 8 + len(text)
    return struct.pack("<Q", len(text)) + text, {
        n: start + h["data_offsets"][0] for n, h in header.items()
    }
