# SPDX-License-Identifier: Apache-2.0
"""Linear algebra of a handful of numbers, in operations that every backend has and rounds alike.

Sums of products are written as such: a matrix product may be computed in fewer bits on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["gram", "solve"]


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
        pivot = rows[k : k + 1] / rows[k : k + 1, k : k + 1]
        reduced = rows - rows[:, k : k + 1] * pivot
        rows = torch.cat([reduced[:k], pivot, reduced[k + 1 :]], dim=0)
    return rows[:, size]
