# SPDX-License-Identifier: Apache-2.0
"""How many branches of a step classifier-free guidance asks of a model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

__all__ = ["branch_count", "embeds_guidance"]


class _Input(Protocol):
    @property
    def argument(self) -> str: ...


def embeds_guidance(inputs: Iterable[_Input]) -> bool:
    """Tell whether a model takes the guidance scale as an input, as FLUX and HunyuanVideo do."""
    return any(entry.argument == "guidance" for entry in inputs)


def branch_count(inputs: Iterable[_Input], scale: float, true_scale: float = 1.0) -> int:
    """Return the branches of a step: 2 where the model runs without the prompt as well, else 1.

    Args:
        inputs: Of the model.
        scale: Guidance scale; of a model that embeds it, no reason for a second branch.
        true_scale: Of such a model's pipeline, the guidance scale beside the embedded one.
    """
    return 2 if (true_scale if embeds_guidance(inputs) else scale) > 1 else 1
