# SPDX-License-Identifier: Apache-2.0
"""Add low-rank changes to a weight: in float32, a few rows at a time, rounded once at the end.

The rows of a share fit in a CPU's cache, so a merge reads the weight once and writes the merged one
once, and holds neither the whole update nor the whole weight in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["LowRank", "merged_weight"]

ELEMENTS = 1 << 18
"""Of a share of rows, in float32."""


@dataclass(frozen=True)
class LowRank:
    """What one adapter makes of a weight W [rows, columns…]: W + up · down.

    Attributes:
        up: [rows, rank], the adapter's scale inside; of a convolution [rows, rank, 1, …].
        down: [rank, columns…].
        magnitude: DoRA: all of the sum is multiplied by what gives each row of W + up · down this
            length, where W is the weight without other adapters, as in PEFT. None: as it is.
    """

    up: Tensor
    down: Tensor
    magnitude: Tensor | None = None


@torch.no_grad()
def merged_weight(weight: Tensor, changes: Sequence[LowRank]) -> Tensor:
    """Return a new weight with every change, in order.

    Args:
        weight: [rows, columns…], any float dtype, on the CPU.
        changes: Their factors have any float dtype.
    """
    merged = torch.empty(weight.shape, dtype=weight.dtype)
    source, target = weight.flatten(1), merged.flatten(1)
    factors = [(c.up.float().flatten(1), c.down.float().flatten(1), c.magnitude) for c in changes]
    count = max(1, ELEMENTS // source.shape[1])
    for first in range(0, len(source), count):
        rows = slice(first, first + count)
        values = source[rows].to(torch.float32, copy=True)
        for up, down, magnitude in factors:
            length = None
            if magnitude is not None:
                alone = source[rows].float().addmm(up[rows], down)
                wanted = magnitude.float().flatten()[rows, None]
                length = wanted / alone.norm(dim=1, keepdim=True)
            values.addmm_(up[rows], down)
            if length is not None:
                values *= length
        target[rows] = values
    return merged
