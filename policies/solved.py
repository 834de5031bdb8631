# SPDX-License-Identifier: Apache-2.0
"""Solved: follow a schedule and mixes that were computed offline from recorded runs."""

from __future__ import annotations

import torch
from torch import Tensor

from ..configs.policy_configs import SOLVED_HISTORY
from ..configs.policy_spec import HistorySpec, ParameterSpec, PolicySpec
from .base import Decision, Policy, Step, hold

__all__ = ["HISTORY", "MAXIMUM_STEPS", "Solved"]

HISTORY = SOLVED_HISTORY
"""Residuals that a row of the mix table may use."""

MAXIMUM_STEPS = 200
"""Steps that the tables hold."""


class Solved(Policy):
    """Take decision and mix of every step from tables.

    The tables are made for a number of steps, ``steps``; a run of S steps takes at step t the row
    ``⌊t · steps / S⌋`` and computes where the rows since the last step hold a computed one. A run
    of as many steps as the tables were made for follows them exactly; others stretch them, which
    keeps the ratios of gaps that a mix depends on. A row of zeros, or one that asks for a residual
    that is not there, holds the newest.

    Reference: ALGORITHMS 7; tables come from least squares and dynamic programming over traces
        (`freewheel.tuning.solve`).
    """

    spec = PolicySpec(
        name="solved",
        summary="follows a schedule and mixes computed offline from recorded runs",
        history=HistorySpec(maximum=HISTORY, parameter="history"),
        parameters={
            "steps": ParameterSpec(
                default=MAXIMUM_STEPS,  # without tables every step is computed
                dtype="int64",
                minimum=1,
                maximum=MAXIMUM_STEPS,
                meaning=f"steps the tables were made for, 1 to {MAXIMUM_STEPS}",
            ),
            "reuse": ParameterSpec(
                default=[0],
                dtype="int64",
                shape=[MAXIMUM_STEPS],
                minimum=0,
                maximum=1,
                meaning="1 for each step that is reused, 0 for each that is computed",
            ),
            "mix": ParameterSpec(
                default=[1.0] + [0.0] * (HISTORY - 1),
                shape=[MAXIMUM_STEPS * HISTORY],
                meaning=f"factors of the last {HISTORY} residuals, newest first, step after step",
            ),
            "history": ParameterSpec(
                default=HISTORY,
                dtype="int64",
                minimum=1,
                maximum=HISTORY,
                meaning=f"residuals that the mixes use, 1 to {HISTORY}",
            ),
        },
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
        """Look the step up; see `Policy.decide`."""
        row = _row(step.step_index, step.step_count, parameters["steps"])
        before = _row(step.step_index - 1, step.step_count, parameters["steps"])
        rows = torch.arange(MAXIMUM_STEPS)
        due = ((parameters["reuse"] == 0) & (rows > before) & (rows <= row)).any()
        table = parameters["mix"].view(MAXIMUM_STEPS, HISTORY)
        mix = table.index_select(0, row.reshape(1)).squeeze(0)
        mix = torch.where(torch.arange(HISTORY) < parameters["history"], mix, 0.0)
        is_missing = ((step.computed_steps < 0) & (mix != 0)).any() | (mix == 0).all()
        return Decision(step.must_compute | due, torch.where(is_missing, hold(step), mix), {})


def _row(step_index: Tensor, step_count: Tensor, steps: Tensor) -> Tensor:
    """Return the table's row for a step, int64 []; -1 for step -1."""
    row = torch.div(step_index * steps, step_count, rounding_mode="floor")
    return torch.where(step_index < 0, -1, row)
