# SPDX-License-Identifier: Apache-2.0
"""Mixes fitted on cached runs bring those runs nearer to the uncached ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from freewheel.bundle.reader import Bundle
from freewheel.policies.setting import CacheSetting
from freewheel.policies.solved import SolvedConfig, SolvedSchedule
from freewheel.runtime.pipeline.generate import Generator
from freewheel.tuning.lockstep import Lockstep, sampler_table
from freewheel.tuning.solve import early_weights, solve

STEPS, COUNT = 20, 8
GUIDANCE = {"cond": 3.0, "uncond": -2.0}


def setting(mix: dict[str, list[list[float]]]) -> CacheSetting:
    """Return a config of one schedule; ``mix`` has an empty row for each step that it computes."""
    some = next(iter(mix.values()))
    schedule = SolvedSchedule(
        computed=[step for step, row in enumerate(some) if not row],
        mix={branch: [row for row in rows if row] for branch, rows in mix.items()},
    )
    return SolvedConfig(feature_caching="Solved", infer_steps=STEPS, schedules=[schedule]).setting()


def distance(latents: Tensor, uncached: Tensor) -> float:
    apart = (latents - uncached).square().mean() / uncached.square().mean()
    return float(10 * torch.log10(apart))


def test_uncached_runs_are_those_of_the_pipeline(lockstep: Lockstep, recorded: Any) -> None:
    assert distance(lockstep.uncached[-1], recorded.latents) < -90


def test_refitted_mixes_come_nearer_to_the_uncached_run(
    generator: Generator, request_of: Any, recorded: Any, lockstep: Lockstep
) -> None:
    weights = early_weights(recorded.sigmas)
    solved = solve(recorded.recorder.grams(), GUIDANCE, weights)[COUNT]
    *_, end = lockstep.run(solved.computed)
    refitted = {branch: list(rows) for branch, rows in end.mix.items()}
    far = []
    for mix in (dict(solved.mix), refitted):
        latents = generator.generate(request_of(setting(mix), steps=STEPS)).latents
        far.append(distance(latents, recorded.latents))
    assert far[1] < far[0] - 3
    assert np.mean(lockstep.distances(end)) == pytest.approx(far[1], abs=0.2), (
        "a real run, as foretold"
    )


def test_a_run_goes_on_from_any_point(lockstep: Lockstep) -> None:
    schedule = (0, 3, 5, 9, 14)
    points = [lockstep.start, *lockstep.run(schedule)]
    *_, end = lockstep.run(schedule, points[:8])
    assert torch.equal(end.samples[-1], points[-1].samples[-1])
    assert end.mix == points[-1].mix


def test_sampler_of_other_timesteps_is_not_taken(demo_bundle: Bundle) -> None:
    assert sampler_table(demo_bundle, np.linspace(999, 1, STEPS)) is None


def test_recorder_notes_what_each_run_began_with(recorded: Any) -> None:
    (start,) = recorded.recorder.starts
    assert start.latents.shape[:2] == (1, 16)
    assert set(start.prompts) == {"cond", "uncond"}
    assert start.prompts["cond"]["text_states"].shape[0] == 1
