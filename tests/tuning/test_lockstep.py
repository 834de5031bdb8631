# SPDX-License-Identifier: Apache-2.0
"""Schedules are fitted, and searched, on the runs that they themselves make."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from freewheel.bundle.reader import Bundle
from freewheel.configs.policy_configs import Solved
from freewheel.configs.setting import CacheSetting
from freewheel.runtime.generate import Generator
from freewheel.tuning.gram import GramRecorder
from freewheel.tuning.lockstep import Lockstep, sampler_rows
from freewheel.tuning.search import candidates, search
from freewheel.tuning.solve import Solution, early_weights, solve

STEPS, COUNT = 20, 8
GUIDANCE = {"cond": 3.0, "uncond": -2.0}


def setting(solution: Solution) -> CacheSetting:
    return Solved(feature_caching="Solved", infer_steps=STEPS, mix=dict(solution.mix)).setting()


@pytest.fixture(scope="module")
def recorded(generator: Generator, request_of: Any) -> tuple[GramRecorder, Tensor]:
    model = generator.transformer.session.model
    recorder = GramRecorder(model, window=8)
    result = generator.generate(request_of(CacheSetting(), steps=STEPS), recorder=recorder)
    return recorder, result.latents


@pytest.fixture(scope="module")
def lockstep(demo_bundle: Bundle, generator: Generator, recorded: Any) -> Lockstep:
    recorder, _ = recorded
    rows = sampler_rows(demo_bundle, recorder.tables["timesteps"])
    assert rows is not None
    model = generator.transformer.session.model
    return Lockstep(model, recorder.starts, rows, GUIDANCE, history=4)


@pytest.fixture(scope="module")
def sigmas(recorded: Any) -> np.ndarray:
    return np.append(recorded[0].tables["timesteps"] / 1000.0, 0.0)


def distance(latents: Tensor, uncached: Tensor) -> float:
    apart = (latents - uncached).square().mean() / uncached.square().mean()
    return float(10 * torch.log10(apart))


def test_uncached_runs_are_those_of_the_pipeline(lockstep: Lockstep, recorded: Any) -> None:
    assert distance(lockstep.uncached[-1], recorded[1]) < -90


def test_refitted_mixes_come_nearer_to_the_uncached_run(
    generator: Generator, request_of: Any, recorded: Any, lockstep: Lockstep, sigmas: np.ndarray
) -> None:
    recorder, uncached = recorded
    solved = solve(recorder.grams(), GUIDANCE, early_weights(sigmas))[COUNT]
    refitted = search(lockstep, [solved.computed], rounds=0)
    assert refitted.computed == solved.computed
    far = [
        distance(generator.generate(request_of(setting(s), steps=STEPS)).latents, uncached)
        for s in (solved, refitted)
    ]
    assert far[1] < far[0] - 3
    assert refitted.error == pytest.approx(far[1], abs=0.2), "a real run is as far as foretold"


def test_search_moves_steps_until_runs_are_nearer(
    recorded: Any, lockstep: Lockstep, sigmas: np.ndarray
) -> None:
    schedules = candidates(recorded[0].grams(), GUIDANCE, sigmas, history=4)[COUNT]
    assert len(schedules) > 1
    alone = [search(lockstep, [schedule], rounds=0).error for schedule in schedules]
    assert search(lockstep, schedules, rounds=0).error == min(alone)
    late = (0, 1, 2, 3, 4, 5, 6, 19)
    found = search(lockstep, [late], rounds=2)
    assert found.error < search(lockstep, [late], rounds=0).error - 0.5
    assert len(found.computed) == COUNT
    for rows in found.mix.values():
        assert [t for t, row in enumerate(rows) if not row] == list(found.computed)
        assert max(len(row) for row in rows) <= 4


def test_a_run_goes_on_from_any_point(lockstep: Lockstep) -> None:
    schedule = (0, 3, 5, 9, 14)
    points = [lockstep.start, *lockstep.run(schedule)]
    *_, end = lockstep.run(schedule, points[:8])
    assert torch.equal(end.samples[-1], points[-1].samples[-1])
    assert end.mix == points[-1].mix


def test_sampler_of_other_timesteps_is_not_taken(demo_bundle: Bundle) -> None:
    assert sampler_rows(demo_bundle, np.linspace(999, 1, STEPS)) is None


def test_recorder_notes_what_each_run_began_with(recorded: Any) -> None:
    recorder, _ = recorded
    (start,) = recorder.starts
    assert start.latents.shape[:2] == (1, 16)
    assert set(start.prompts) == {"cond", "uncond"}
    assert start.prompts["cond"]["text_states"].shape[0] == 1
