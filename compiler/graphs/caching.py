# SPDX-License-Identifier: Apache-2.0
"""The graphs of caching itself, the same for every model and every policy."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...engines.base import TensorSpec
from ..cut.declared import FIRST_BLOCK_RESIDUAL, Segment

__all__ = ["cache_segments"]


class Delta(nn.Module):
    """Hidden states after and before ``body`` → residual."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, hidden_out: Tensor, hidden: Tensor) -> Tensor:
        """Return ``residual``, in the dtype in which history is kept."""
        return (hidden_out - hidden).to(self.dtype)


class Reuse(nn.Module):
    """Hidden states and past residuals → hidden states as if ``body`` had run.

    ``mix`` follows the slots of the ring, not their age; the runtime permutes K scalars rather
    than K hidden-sized tensors.
    """

    def forward(self, hidden: Tensor, history: Tensor, mix: Tensor) -> Tensor:
        """Return ``hidden + Σ mix[k] · history[k]``, float32."""
        flat = history.to(torch.float32).flatten(1)
        return hidden + torch.matmul(mix.unsqueeze(0), flat).reshape(hidden.shape)


class Gram(nn.Module):
    """Past residuals → the inner products of those linear combinations that ``factors`` names.

    Combinations are made before they are multiplied: products of neighbouring residuals differ in
    digits that float32 sums don't have.
    """

    def forward(self, history: Tensor, factors: Tensor) -> Tensor:
        """Return the mean products of elements, float32 [slots, slots]."""
        rows = torch.matmul(factors, history.to(torch.float32).flatten(1))
        return torch.matmul(rows, rows.transpose(0, 1)) / rows.shape[1]


def cache_segments(hidden: TensorSpec, history_dtype: str) -> tuple[Segment, ...]:
    """Return ``delta``, ``reuse``, ``gram`` and the probe's signal for hidden states of this spec."""
    residual = TensorSpec(history_dtype, hidden.shape)
    history = TensorSpec(history_dtype, ("slots", *hidden.shape))
    return (
        Segment(
            "delta", "computed", Delta(getattr(torch, history_dtype)),
            {"hidden_out": hidden, "hidden": hidden}, {"residual": residual},
        ),
        Segment(
            "reuse", "reused", Reuse(),
            {"hidden": hidden, "history": history, "mix": TensorSpec("float32", ("slots",))},
            {"hidden_out": hidden},
        ),
        Segment(
            "gram", "computed", Gram(),
            {"history": history, "factors": TensorSpec("float32", ("slots", "slots"))},
            {"gram": TensorSpec("float32", ("slots", "slots"))},
        ),
        Segment(
            FIRST_BLOCK_RESIDUAL, "probe", Delta(torch.float32),
            {"hidden_out": hidden, "hidden": hidden}, {FIRST_BLOCK_RESIDUAL: hidden},
        ),
    )  # fmt: skip
