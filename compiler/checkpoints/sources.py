# SPDX-License-Identifier: Apache-2.0
"""Where a weight comes from: a place in a file, or other weights of which it is made when it is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from ...bundle.safetensors_header import StoredTensor
from ...core.dtypes import ITEM_BYTES
from ...core.errors import CheckpointError

__all__ = ["WIDE", "MadeTensor", "ScaledTensor", "Weight", "lies_as", "part_of", "read_weight"]

WIDE = "bfloat16"
"""In which graphs take a weight in 8 bits where they have no dtype of their own for it."""


@dataclass(frozen=True)
class MadeTensor:
    """A weight that lies in no file byte for byte.

    Attributes:
        dtype: In which graphs take it where they have no dtype of their own for it.
        shape: Its shape.
        reason: Why it has to be made, in a few words, for messages: ``"fused or split"``.
        make: Reads what it is made of, and returns it with this shape; its dtype may be wider.
    """

    dtype: str
    shape: tuple[int, ...]
    reason: str
    make: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        """Its size in ``dtype``."""
        return prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class ScaledTensor:
    """A weight that lies in a file in 8 bits, to be multiplied by a scale.

    Attributes:
        values: What lies there, [rows, …].
        scale: Of a float dtype: one number for the weight, or one for each row.
    """

    values: StoredTensor
    scale: StoredTensor

    @property
    def dtype(self) -> str:
        """In which graphs take it where they have no dtype of their own for it."""
        return WIDE

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.values.shape

    @property
    def bytes(self) -> int:
        """Its size in ``dtype``."""
        return prod(self.shape) * ITEM_BYTES[WIDE]

    def part(self, shape: tuple[int, ...], first: int) -> ScaledTensor | None:
        """Return a contiguous part of it; None where that has another's rows.

        Args:
            shape: The part's.
            first: Its first value.
        """
        values, scale = part_of(self.values, shape, first), self.scale
        if prod(scale.shape) == 1:
            return ScaledTensor(values, scale)
        row = prod(self.shape[1:])
        if not shape or prod(shape[1:]) != row or first % row:
            return None
        return ScaledTensor(values, part_of(scale, shape[:1], first // row))


Weight = StoredTensor | MadeTensor | ScaledTensor


def part_of(whole: StoredTensor, shape: tuple[int, ...], first: int) -> StoredTensor:
    """Return a contiguous part of a tensor, of a shape, from its value ``first`` on."""
    item = ITEM_BYTES[whole.dtype]
    return replace(whole, shape=shape, offset=whole.offset + first * item, bytes=prod(shape) * item)


def lies_as(weight: Weight, dtype: str) -> bool:
    """Ask whether the bytes of a weight in ``dtype`` lie aligned in its file: a link to it serves."""
    if not isinstance(weight, StoredTensor) or weight.dtype != dtype:
        return False
    return weight.offset % ITEM_BYTES[dtype] == 0


def read_weight(weight: Weight) -> Tensor:
    """Read a weight into memory of its own, on the CPU; with it what it is made of, and no more.

    Raises:
        CheckpointError: its file has become shorter since its header was read.
        OSError: its file can't be read.
    """
    if isinstance(weight, MadeTensor):
        made = weight.make()
        assert made.shape == weight.shape, f"made {list(made.shape)}, not {list(weight.shape)}"
        return made
    if isinstance(weight, ScaledTensor):
        values = read_weight(weight.values).to(torch.float32)
        scale = read_weight(weight.scale).to(torch.float32)
        return values.mul_(scale.reshape(-1, *[1] * (values.ndim - 1)))
    content = bytearray(weight.bytes)
    with weight.file.open("rb") as stream:
        stream.seek(weight.offset)
        read = stream.readinto(content)
    if read != weight.bytes:
        raise CheckpointError(
            f"{weight.file}, tensor '{weight.name}'", "is cut short", "fetch the file again"
        )
    dtype: torch.dtype = getattr(torch, weight.dtype)
    if not content:
        return torch.empty(weight.shape, dtype=dtype)
    return torch.frombuffer(content, dtype=dtype).view(weight.shape)
