# SPDX-License-Identifier: Apache-2.0
"""What a graph's input or output is, as families declare it, passes write it and engines bind it."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["TensorSpec"]

Dim = int | str


@dataclass(frozen=True)
class TensorSpec:
    """Name-free description of a graph input or output.

    Attributes:
        dtype: Spelled as in torch: ``float32``, ``bfloat16``, ``float16``, ``int64``, ``bool``.
        shape: Fixed sizes as int, dynamic ones by their name.
    """

    dtype: str
    shape: tuple[Dim, ...]
