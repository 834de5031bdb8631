# SPDX-License-Identifier: Apache-2.0
"""Sensitivities of the demo model, beside what its own engines answer."""

from __future__ import annotations

import numpy as np
import pytest

from freewheel.policies.schedule import Schedule
from freewheel.policies.setting import CacheSetting
from freewheel.tuning.lockstep import Lockstep
from freewheel.tuning.sensitivity import computed_steps, measure


@pytest.fixture(scope="module")
def schedule(recorded) -> Schedule:
    tables = recorded.recorder.tables
    return Schedule.of(tables["timesteps"].tolist(), tables["sigmas"].tolist())


def test_both_say_how_far_the_output_moves(lockstep: Lockstep, schedule: Schedule) -> None:
    found = measure(lockstep, "cond", schedule)
    assert found.timesteps == list(schedule.timesteps)
    assert found.latents[-1] == found.latents[-2]
    step, (now, later) = 7, lockstep.uncached[7:9]
    output = lockstep.output("cond", step, now).numpy()
    by_latents = lockstep.output("cond", step, later).numpy() - output
    expected = np.linalg.norm(by_latents) / np.linalg.norm((later - now).numpy())
    assert found.latents[step] == pytest.approx(expected, rel=1e-4)
    by_timestep = lockstep.output("cond", step + 1, now).numpy() - output
    passed = schedule.timesteps[step] - schedule.timesteps[step + 1]
    expected = np.sqrt(np.square(by_timestep).mean()) / passed
    assert found.timestep[step] == pytest.approx(expected, rel=1e-4)


def test_output_is_that_of_the_run_it_was_taken_from(lockstep: Lockstep) -> None:
    step = 5
    guided = sum(
        factor * lockstep.output(branch, step, lockstep.uncached[step])
        for branch, factor in (("cond", 3.0), ("uncond", -2.0))
    )
    np.testing.assert_allclose(guided, lockstep._uncached_outputs[step], atol=1e-4)


def test_computed_steps_fall_as_the_threshold_rises(lockstep: Lockstep, schedule: Schedule) -> None:
    found = measure(lockstep, "cond", schedule)
    counts = []
    for threshold in (0.0, 0.12, 0.2, 9.0):
        parameters = {
            "threshold": threshold,
            "early_threshold": 9.0,
            "timesteps": found.timesteps,
            "latent_sensitivity": found.latents,
            "timestep_sensitivity": found.timestep,
        }
        setting = CacheSetting(policy="sencache", parameters=parameters)
        counts.append(computed_steps(lockstep, setting, schedule))
    assert counts[0] == 20
    assert counts[-1] == 2  # the first, and one after ten reuses in a row
    assert counts == sorted(counts, reverse=True)
    assert len(set(counts)) == 4
