# SPDX-License-Identifier: Apache-2.0
"""Mixes fitted on cached runs bring those runs nearer to the uncached ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from freewheel.bundle.reader import Bundle
from freewheel.configs.setting import CacheSetting
from freewheel.runtime.generate import Generator
from freewheel.tuning.gram import GramRecorder
from freewheel.tuning.refine import refine, sampler_rows
from freewheel.tuning.solve import Solution, early_weights, solve

STEPS, COUNT = 20, 10
GUIDANCE = {"cond": 3.0, "uncond": -2.0}


def setting(solution: Solution) -> CacheSetting:
    branches = {}
    for name, rows in solution.mix.items():
        filled = [[*(row or [1.0]), 0.0, 0.0, 0.0][:4] for row in rows]
        branches[name] = {
            "steps": STEPS,
            "reuse": [int(bool(row)) for row in rows],
            "mix": [factor for row in filled for factor in row],
            "history": 4,
        }
    return CacheSetting(policy="solved", branches=branches)


@pytest.fixture(scope="module")
def recorded(generator: Generator, request_of: Any) -> tuple[GramRecorder, torch.Tensor]:
    model = generator.transformer.session.model
    recorder = GramRecorder(model, window=8)
    result = generator.generate(request_of(CacheSetting(), steps=STEPS), recorder=recorder)
    return recorder, result.latents


def test_refined_mixes_come_nearer_to_the_uncached_run(
    demo_bundle: Bundle, generator: Generator, request_of: Any, recorded: Any
) -> None:
    recorder, uncached = recorded
    rows = sampler_rows(demo_bundle, recorder.tables["timesteps"])
    assert rows is not None
    sigmas = np.append(recorder.tables["timesteps"] / 1000.0, 0.0)
    solved = {COUNT: solve(recorder.grams(), GUIDANCE, early_weights(sigmas))[COUNT]}
    model = generator.transformer.session.model
    refined = refine(model, recorder.starts, rows, GUIDANCE, solved, history=4)
    assert refined[COUNT].computed == solved[COUNT].computed
    errors = []
    for solution in (solved[COUNT], refined[COUNT]):
        result = generator.generate(request_of(setting(solution), steps=STEPS))
        errors.append(float((result.latents - uncached).square().mean()))
    assert errors[1] < 0.5 * errors[0]


def test_sampler_of_other_timesteps_is_not_taken(demo_bundle: Bundle) -> None:
    assert sampler_rows(demo_bundle, np.linspace(999, 1, STEPS)) is None


def test_recorder_notes_what_each_run_began_with(recorded: Any) -> None:
    recorder, _ = recorded
    (start,) = recorder.starts
    assert start.latents.shape[:2] == (1, 16)
    assert set(start.prompts) == {"cond", "uncond"}
    assert start.prompts["cond"]["text_states"].shape[0] == 1
