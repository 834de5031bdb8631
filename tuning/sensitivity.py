# SPDX-License-Identifier: Apache-2.0
"""How far a model's output moves with its latents and with its timestep, along uncached runs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ..policies.decision_loop import DecisionLoop
from ..policies.schedule import Schedule
from ..policies.setting import CacheSetting
from .lockstep import Lockstep

__all__ = ["Sensitivities", "computed_steps", "measure"]


@dataclass(frozen=True)
class Sensitivities:
    """What SenCache's tables hold, one number per step; the last step's are those before it.

    Attributes:
        timesteps: At which they were measured.
        latents: Root mean square of the output's move over that of the latents'.
        timestep: Root mean square of the output's move per unit of the timestep.
    """

    timesteps: list[float]
    latents: list[float]
    timestep: list[float]


def measure(lockstep: Lockstep, branch: str, schedule: Schedule) -> Sensitivities:
    """Measure both along the uncached runs: three calls of the model per step and run.

    Between a step and the next one, the output at this step's timestep is compared for both
    samples, and the output for this sample at both timesteps.

    Args:
        lockstep: The runs.
        branch: Whose output.
        schedule: Of the runs; two steps or more.

    Reference: Haghighi and Alahi 2026, SenCache, arXiv 2602.24208, finite differences of its
        calibration.
    """
    by_latents, by_timestep = [], []
    for step in range(lockstep.steps - 1):
        sample, following = lockstep.uncached[step : step + 2]
        output = lockstep.output(branch, step, sample)
        moved = lockstep.output(branch, step, following) - output
        later = lockstep.output(branch, step + 1, sample) - output
        inputs = lockstep.inputs(following) - lockstep.inputs(sample)
        passed = abs(schedule.timesteps[step + 1] - schedule.timesteps[step])
        by_latents.append(float((_rms(moved) / _rms(inputs)).mean()))
        by_timestep.append(float(_rms(later).mean()) / passed)
    return Sensitivities(
        list(schedule.timesteps), [*by_latents, by_latents[-1]], [*by_timestep, by_timestep[-1]]
    )


def computed_steps(lockstep: Lockstep, setting: CacheSetting, schedule: Schedule) -> float:
    """Return how many steps a policy that looks at latents alone computes, the mean of the runs."""
    counts = []
    for run in range(len(lockstep.start.samples[0])):
        law = DecisionLoop.eager(setting, step_count=lockstep.steps, schedule=schedule)
        seen = (lockstep.inputs(s)[run].flatten(0, -2) for s in lockstep.uncached[: lockstep.steps])
        counts.append(sum(law.decide(latents).compute for latents in seen))
    return float(np.mean(counts))


def _rms(tensor: torch.Tensor) -> torch.Tensor:
    """Return the root mean square of each run, [runs]."""
    return tensor.flatten(1).square().mean(1).sqrt()
