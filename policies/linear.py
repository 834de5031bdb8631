# SPDX-License-Identifier: Apache-2.0
"""Linear algebra of a handful of numbers, in operations that every backend has and rounds alike.

Sums of products are written as such: a matrix product may be computed in fewer bits on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["gram", "solve"]

SUMMED = 8
"""Terms of a sum that TensorRT keeps as a reduction; it writes one of 2 out as an addition."""


def gram(columns: Tensor) -> Tensor:
    """Return the inner products of columns, float32 [n, n].

    Args:
        columns: float32 [rows, n].
    """
    return (columns.unsqueeze(2) * columns.unsqueeze(1)).sum(dim=0)


def solve(matrix: Tensor, right: Tensor) -> Tensor:
    """Return x of ``matrix · x = right`` by Gauss-Jordan elimination without exchanges of rows.

    Args:
        matrix: float32 [n, n], symmetric and positive definite, for which that is stable.
        right: float32 [n].

    Returns:
        float32 [n]; not finite where the matrix is singular.
    """
    size = matrix.shape[0]
    rows = torch.cat([matrix, right.unsqueeze(1)], dim=1)
    for k in range(size):
        rows = _computed_once(rows)
        pivot = rows[k : k + 1] / rows[k : k + 1, k : k + 1]
        reduced = rows - rows[:, k : k + 1] * pivot
        rows = torch.where(torch.arange(size).unsqueeze(1) == k, pivot, reduced)
    return _computed_once(rows[:, size])


def _computed_once(values: Tensor) -> Tensor:
    """Return the values, summed with zeros: TensorRT computes a sum before what reads it.

    Otherwise TensorRT-RTX 1.7 writes an elementwise expression out again for every slice that is
    read of it, some 4ⁿ times over an elimination: 1.1 GB of engine for n = 5.
    """
    zeros = torch.zeros(*values.shape, SUMMED - 1)
    return torch.cat([values.unsqueeze(-1), zeros], dim=-1).sum(dim=-1)
