# SPDX-License-Identifier: Apache-2.0
"""Weights that a bundle holds in float8: the graphs that take one take the scale of its rows beside it."""

from __future__ import annotations

__all__ = ["KEPT", "scale_name"]

KEPT = "float8_e4m3fn"
"""dtype of such weights: every backend takes it as an input, and TensorRT no other of 8 bits."""


def scale_name(weight: str) -> str:
    """Return what the scale of a weight's rows is called: float32 [rows, 1, …]."""
    return f"{weight}_row_scale"
