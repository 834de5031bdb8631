# SPDX-License-Identifier: Apache-2.0
"""MagCache: reuse while the residual's magnitude, known from a calibration, has changed little."""

from __future__ import annotations

import torch
from torch import Tensor

from ..configs.policy_spec import HistorySpec, ParameterSpec, PolicySpec, StateSpec
from .base import Decision, Policy, Step, hold

__all__ = ["MAXIMUM_STEPS", "MagCache"]

MAXIMUM_STEPS = 200
"""Steps that the table of ratios holds."""


class MagCache(Policy):
    """Hold the newest residual while the product of calibrated magnitude ratios stays near 1.

    Looks at no tensor of the run: the ratios ‖r_t‖ / ‖r_{t−1}‖ of one calibration run stand for
    every prompt, so the whole sequence is known before step 0.

    Reference: Ma et al. 2025, MagCache, arXiv 2506.09045, section 3.3 (error model and strategy).

    Differs: threshold 0 never reuses, even where every ratio is 1.
    """

    spec = PolicySpec(
        name="magcache",
        summary="reuses while calibrated magnitude ratios say that the residual changed little",
        history=HistorySpec(maximum=1),
        state={
            "error": StateSpec(),
            "ratio": StateSpec(initial=1.0),
            "skipped": StateSpec(dtype="int64"),
        },
        parameters={
            "threshold": ParameterSpec(
                default=0.12,
                minimum=0.0,
                meaning="accumulated error at which a step is computed, >= 0; 0 never reuses",
            ),
            "max_skip": ParameterSpec(
                default=4, dtype="int64", minimum=0, meaning="reuses allowed in a row, >= 0"
            ),
            "retention": ParameterSpec(
                default=0.2,
                minimum=0.0,
                maximum=1.0,
                meaning="fraction of the run that is computed at its start, 0 to 1",
            ),
            "steps": ParameterSpec(
                default=1,
                dtype="int64",
                minimum=1,
                maximum=MAXIMUM_STEPS,
                meaning=f"steps of the calibration run, 1 to {MAXIMUM_STEPS}",
            ),
            "ratios": ParameterSpec(
                default=[1.0],
                shape=[MAXIMUM_STEPS],
                minimum=0.0,
                meaning="residual magnitude over that of the step before, one per step",
            ),
        },
        distance="error",
        reference="Ma et al. 2025, MagCache, arXiv 2506.09045",
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
        """Decide from the accumulated error; see `Policy.decide`."""
        ratio = state["ratio"] * _ratio(step, parameters)
        skipped = state["skipped"] + 1
        error = state["error"] + (1.0 - ratio).abs()
        retained = torch.floor(step.step_count.to(torch.float32) * parameters["retention"])
        reuse = (
            (error < parameters["threshold"])
            & (skipped <= parameters["max_skip"])
            & (step.step_index >= retained.to(torch.int64))
        )
        compute = step.must_compute | ~reuse
        return Decision(
            compute,
            hold(step),
            {
                "error": torch.where(compute, 0.0, error),
                "ratio": torch.where(compute, 1.0, ratio),
                "skipped": torch.where(compute, 0, skipped),
            },
        )


def _ratio(step: Step, parameters: dict[str, Tensor]) -> Tensor:
    """Return this step's ratio, float32 []: nearest in a table of another number of steps."""
    last, wanted = parameters["steps"] - 1, torch.clamp(step.step_count - 1, min=1)
    position = (step.step_index * last).to(torch.float32) / wanted.to(torch.float32)
    nearest = torch.round(position).to(torch.int64)
    return parameters["ratios"].index_select(0, nearest.reshape(1)).squeeze(0)
