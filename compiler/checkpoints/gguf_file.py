# SPDX-License-Identifier: Apache-2.0
"""Read a GGUF file's tensors, through the `gguf` package, as weights that are dequantised when read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import partial
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...core.errors import CheckpointError
from ...core.extras import require_extra
from .sources import WIDE, MadeTensor

__all__ = ["read_gguf"]

PLAIN: Mapping[str, str] = MappingProxyType(
    {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
)
"""Kind that is not quantised → dtype."""

PIECE = 1 << 20
"""Values that are dequantised at once: the package's own temporaries are several times theirs."""

ORIGINAL_SHAPE = "comfy.gguf.orig_shape."
"""Before a tensor's name: the key of its shape, where GGUF's four dimensions were too few for it."""


def read_gguf(file: Path) -> tuple[dict[str, MadeTensor], tuple[str, ...]]:
    """Return the tensors of a file by the names that it has, and notes for people.

    Nothing is read but the header; a weight is dequantised by itself, into float32.

    Raises:
        DependencyError: the `gguf` package is not installed.
        CheckpointError: the file is damaged, or has a kind of weight that the package can't dequantise.
    """
    require_extra("gguf", f"reading '{file}'")
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
        shapes = {t.name: _shape(reader, t) for t in reader.tensors}
    except (ValueError, IndexError, KeyError, OverflowError, OSError) as error:
        raise CheckpointError(
            str(file), f"is damaged, or no GGUF file: {error}", "fetch the file again"
        ) from error
    tensors: dict[str, MadeTensor] = {}
    kinds: Counter[str] = Counter()
    read = 0
    for entry in reader.tensors:
        kind = entry.tensor_type.name
        _check_kind(entry.tensor_type, f"{file}, tensor '{entry.name}'")
        if kind not in PLAIN:
            kinds[kind] += 1
            read += int(entry.n_bytes)
        make = partial(
            _dequantised,
            file,
            int(entry.data_offset),
            int(entry.n_bytes),
            entry.tensor_type,
            shapes[entry.name],
        )
        dtype = PLAIN.get(kind, WIDE)
        tensors[entry.name] = MadeTensor(dtype, shapes[entry.name], f"GGUF {kind}", make)
    if not kinds:
        return tensors, ()
    written = sum(t.bytes for t in tensors.values() if t.reason.split()[1] in kinds) / 1e6
    listed = ", ".join(f"{n} in {kind}" for kind, n in kinds.most_common())
    return tensors, (
        f"GGUF: {kinds.total()} weights ({listed}; {read / 1e6:.1f} MB) are dequantised into the "
        f"bundle ({written:.1f} MB in bfloat16, twice that where it takes float32)",
    )


def _shape(reader: Any, entry: Any) -> tuple[int, ...]:
    """Return a tensor's shape, slowest dimension first."""
    shape = tuple(int(n) for n in reversed(entry.shape))
    field = reader.get_field(ORIGINAL_SHAPE + entry.name)
    if field is None:
        return shape
    told = tuple(int(field.parts[i][0]) for i in field.data)
    if prod(told) != prod(shape) or not all(n > 0 for n in told):
        raise ValueError(f"tensor '{entry.name}' is {list(shape)}, and its key says {list(told)}")
    return told


def _check_kind(kind: Any, where: str) -> None:
    """Refuse a kind that the package can't dequantise."""
    from gguf import GGML_QUANT_SIZES
    from gguf.quants import dequantize

    try:
        dequantize(np.zeros(GGML_QUANT_SIZES[kind][1], dtype=np.uint8), kind)
    except (NotImplementedError, KeyError) as error:
        raise CheckpointError(
            where,
            f"is in {kind.name}, which holds no weights that can be dequantised",
            "take the file in Q8_0, Q6_K, Q5_K or Q4_K, or the checkpoint in bfloat16",
        ) from error


def _dequantised(file: Path, offset: int, size: int, kind: Any, shape: tuple[int, ...]) -> Tensor:
    """Read one tensor and return it in float32, a piece of it at a time beside the result."""
    from gguf import GGML_QUANT_SIZES
    from gguf.quants import dequantize

    content = np.fromfile(file, dtype=np.uint8, count=size, offset=offset)
    if content.size != size:
        raise CheckpointError(str(file), "is cut short", "fetch the file again")
    values, block_bytes = GGML_QUANT_SIZES[kind]
    result = np.empty(prod(shape), dtype=np.float32)
    blocks = max(1, PIECE // values)
    for first in range(0, size // block_bytes, blocks):
        part = dequantize(content[first * block_bytes : (first + blocks) * block_bytes], kind)
        result[first * values : first * values + part.size] = part
    return torch.from_numpy(result).view(shape)
