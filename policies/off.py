# SPDX-License-Identifier: Apache-2.0
"""Off: every step is computed, no residual is kept; what every other policy is compared with."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from .base import Decision, Policy, Step
from .config import CachingConfig
from .spec import HistorySpec, PolicySpec

__all__ = ["Off", "OffConfig"]


class OffConfig(CachingConfig):
    """Compute every step."""

    policy: ClassVar[str] = "off"

    feature_caching: Literal["NoCaching", "None"] = "NoCaching"


class Off(Policy):
    """Compute every step."""

    config = OffConfig

    spec = PolicySpec(
        name="off",
        summary="computes every step",
        history=HistorySpec(maximum=1, depth=0),
    )

    def decide(
        self,
        step: Step,
        signal: Tensor,
        feature: Tensor,
        kept: dict[str, Tensor],
        state: dict[str, Tensor],
        parameters: dict[str, Tensor],
    ) -> Decision:
        """Compute; see `Policy.decide`."""
        return Decision(compute=torch.ones((), dtype=torch.bool), state={})
