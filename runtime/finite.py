# SPDX-License-Identifier: Apache-2.0
"""Tell cheaply whether a tensor holds a value that is not finite."""

from __future__ import annotations

from torch import Tensor

__all__ = ["is_finite"]


def is_finite(tensor: Tensor) -> bool:
    """Tell whether every element is finite.

    Reads the tensor once and allocates a scalar: a sum of finite values may overflow, but one that
    holds an infinity or a NaN is never finite. Only a sum that is not finite is looked into.

    Args:
        tensor: Any shape, float dtype and device; its writes have ended.
    """
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())
