# SPDX-License-Identifier: Apache-2.0
"""Off: every step is computed, no residual is kept; what every other policy is compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from ..configs.policy_spec import HistorySpec, PolicySpec
from .base import Decision, Policy, Step, hold

__all__ = ["Off"]


class Off(Policy):
    """Compute every step."""

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
        return Decision(compute=torch.ones((), dtype=torch.bool), mix=hold(step), state={})
