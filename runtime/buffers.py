# SPDX-License-Identifier: Apache-2.0
"""Make the buffers that engines are bound to."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..bundle.dims import shape_of
from ..bundle.manifest import IoEntry

__all__ = ["allocate"]


def allocate(
    entries: Mapping[str, IoEntry], dims: Mapping[str, int], device: torch.device
) -> dict[str, Tensor]:
    """Return zeroed buffers for declared tensors."""
    return {
        n: torch.zeros(shape_of(e, dims), dtype=getattr(torch, e.dtype), device=device)
        for n, e in entries.items()
    }
