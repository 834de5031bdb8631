# SPDX-License-Identifier: Apache-2.0
"""The decision to compute one step in so many, which several forecasts go with."""

from __future__ import annotations

from torch import Tensor

from .base import Decision, Policy, Step
from .spec import ParameterSpec

__all__ = ["INTERVAL", "Interval"]

INTERVAL = ParameterSpec(
    default=4,
    dtype="int64",
    minimum=1,
    meaning="steps per computed step, the first being computed, >= 1; 1 never reuses",
)


class Interval(Policy):
    """Compute the first of every ``interval`` steps.

    No row of the table: its subclasses are, each with a forecast of the steps in between. The
    decision looks at no tensor, so the whole sequence is known before the run.
    """

    def decide(
        self,
        step: Step,
        signal: Tensor,
        feature: Tensor,
        kept: dict[str, Tensor],
        state: dict[str, Tensor],
        parameters: dict[str, Tensor],
    ) -> Decision:
        """Decide from the step index alone; see `Policy.decide`."""
        due = step.step_index % parameters["interval"] == 0
        return Decision(step.must_compute | due, {})
