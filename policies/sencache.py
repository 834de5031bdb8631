# SPDX-License-Identifier: Apache-2.0
"""SenCache: reuse while the output can't have moved far, by how it answers to its two inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Decision, Policy, Step
from .spec import HistorySpec, ParameterSpec, PolicySpec, StateSpec

__all__ = ["MAXIMUM_STEPS", "SenCache"]

MAXIMUM_STEPS = 200
"""Steps that the tables hold."""


class SenCache(Policy):
    """Hold the newest residual while a bound of the model output's change stays below a threshold.

    With s the last computed step, ``A`` how much the output moves per move of the latents and ``B``
    per unit of the timestep, both of a calibration and read where the timestep was nearest to that
    of s: ``A(s) · rms(x_t − x_s) + B(s) · |timestep_t − timestep_s|``.

    Reference: Haghighi and Alahi 2026, SenCache, arXiv 2602.24208, sensitivity score and caching
        rule; two thresholds and the limit of reuses in a row as in its authors' code.

    Differs: norms are root mean squares, so that a threshold serves every size; the authors multiply it
        by the square root of the latents' elements instead.
    Differs: threshold 0 never reuses, whatever ``early_threshold`` says.
    """

    spec = PolicySpec(
        name="sencache",
        summary="reuses while a calibrated bound of the output's change stays small",
        signals=["latents"],
        kept=["computed_signal"],
        one_decision=True,
        history=HistorySpec(maximum=1),
        state={"distance": StateSpec(), "skipped": StateSpec(dtype="int64")},
        parameters={
            "threshold": ParameterSpec(
                default=0.07,
                minimum=0.0,
                meaning="root mean square of the output's change at which a step is computed, >= 0;"
                " 0 never reuses",
            ),
            "early_threshold": ParameterSpec(
                default=0.005,
                minimum=0.0,
                meaning="the same at the start of a run, where it is the smaller one, >= 0",
            ),
            "early": ParameterSpec(
                default=0.2,
                minimum=0.0,
                maximum=1.0,
                meaning="share of the run that counts as its start, 0 to 1",
            ),
            "max_skip": ParameterSpec(
                default=10, dtype="int64", minimum=0, meaning="reuses allowed in a row, >= 0"
            ),
            "timesteps": ParameterSpec(
                default=[1000.0],
                shape=[MAXIMUM_STEPS],
                meaning="timesteps at which the model was calibrated",
            ),
            "latent_sensitivity": ParameterSpec(
                default=[0.3],
                shape=[MAXIMUM_STEPS],
                minimum=0.0,
                meaning="move of the output over that of the latents, one per timestep",
            ),
            "timestep_sensitivity": ParameterSpec(
                default=[0.0003],
                shape=[MAXIMUM_STEPS],
                minimum=0.0,
                meaning="move of the output per unit of the timestep, one per timestep",
            ),
        },
        distance="distance",
        reference="Haghighi and Alahi 2026, SenCache, arXiv 2602.24208",
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
        """Decide from the latents and the timestep of the last computed step; see `Policy.decide`."""
        then = step.computed_timesteps[0]
        moved = (signal - kept["computed_signal"]).square().mean().sqrt()
        distance = _nearest(then, "latent_sensitivity", parameters) * moved
        passed = (step.timestep - then).abs()
        distance = distance + _nearest(then, "timestep_sensitivity", parameters) * passed

        started = step.step_count.to(torch.float32) * parameters["early"]
        is_early = step.step_index.to(torch.float32) < started
        threshold = parameters["threshold"]
        strict = torch.minimum(threshold, parameters["early_threshold"])
        skipped = state["skipped"] + 1
        reuse = (distance < torch.where(is_early, strict, threshold)) & (
            skipped <= parameters["max_skip"]
        )
        compute = step.must_compute | ~reuse
        return Decision(
            compute,
            {
                "distance": torch.where(compute, 0.0, distance),
                "skipped": torch.where(compute, 0, skipped),
            },
        )


def _nearest(timestep: Tensor, table: str, parameters: dict[str, Tensor]) -> Tensor:
    """Return a table's value where its timestep is nearest, float32 []; the mean of several such."""
    away = (parameters["timesteps"] - timestep).abs()
    is_nearest = (away == away.min()).to(torch.float32)
    return (is_nearest * parameters[table]).sum() / is_nearest.sum()
