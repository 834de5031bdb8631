# SPDX-License-Identifier: Apache-2.0
"""SeaCache's decisions and forecasts: one behaviour at a time, and those of diffusers' hook."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers.hooks.sea_cache import (
    SeaCacheConfig,
    SeaCacheContextState,
    SeaCacheSharedState,
    _SeaCacheForwardMetadata,
)
from runs import TIE, fold, forecasts, random_run

from freewheel.configs.load import load_config
from freewheel.policies.decision_loop import DecisionLoop
from freewheel.policies.setting import CacheSetting, GuardSetting

STEPS = 30


@pytest.mark.parametrize("threshold", [0.2, 0.5, 2.0])
@pytest.mark.parametrize(("in_a_row", "last_exact"), [(2, 1), (0, 0), (5, 3)])
@pytest.mark.parametrize("seed", range(3))
def test_decides_and_forecasts_as_diffusers_hook(
    threshold: float, in_a_row: int, last_exact: int, seed: int
) -> None:
    run = random_run(seed, STEPS)
    setting = CacheSetting(
        policy="seacache",
        parameters={"threshold": threshold},
        guard=GuardSetting(last_exact=last_exact, max_consecutive=in_a_row),
    )
    records = fold(DecisionLoop.eager(setting, step_count=STEPS), run)
    reused = forecasts(records, run["residual"])
    config = SeaCacheConfig(
        threshold=threshold, cache_end_steps=last_exact, max_consecutive_cached=in_a_row
    )
    state, shared = SeaCacheContextState(), SeaCacheSharedState()
    held: list[tuple[int, np.ndarray]] = []
    for step, (record, forecast) in enumerate(zip(records, reused, strict=True)):
        metadata = _SeaCacheForwardMetadata(step, 1 - step / STEPS, STEPS)
        indicator = [torch.from_numpy(run["signal"][step])]
        computes = shared.resolve_gate(state, metadata, indicator, config)
        if computes != record.compute:
            assert abs(float(record.distance or threshold) - threshold) < TIE * threshold
            return
        if computes:
            state.consecutive_cached = 0
            held = [(step, run["residual"][step]), *held][:2]
            continue
        state.consecutive_cached += 1
        expected = held[0][1]
        if len(held) == 2:
            (last, newest), (before, older) = held
            expected = newest + (newest - older) * ((step - last) / (last - before))
        np.testing.assert_allclose(forecast, expected, rtol=1e-5, atol=1e-5)
    assert {r.compute for r in records} == {True, False}


def decisions(values: list[float], **parameters: object) -> str:
    law = DecisionLoop.eager(
        CacheSetting(policy="seacache", parameters=parameters), step_count=len(values)
    )
    records = [law.decide(np.full((2, 3), value, np.float32)) for value in values]
    return "".join("#" if r.compute else "." for r in records)


def test_changes_from_step_to_step_add_up() -> None:
    # A tenth each: two stay below, and the third would not.
    assert decisions([1.0, 1.1, 1.21, 1.331, 1.4641], threshold=0.25) == "#..#."
    # There and back again is two changes, not none.
    assert decisions([1.0, 1.2, 1.0, 1.0], threshold=0.25) == "#.#."


def test_threshold_0_never_reuses() -> None:
    assert decisions([1.0, 1.0, 1.0], threshold=0.0) == "###"


def test_nothing_under_the_noise_computes() -> None:
    assert decisions([0.0, 0.0, 1.0, 1.0], threshold=0.5) == "###."


def test_by_name_ends_are_exact_and_two_reuses_in_a_row_the_most() -> None:
    setting = load_config("seacache").setting()
    limits = setting.guard.model_dump(exclude_defaults=True)
    assert limits == {"last_exact": 1, "max_consecutive": 2}
    assert setting.parameters == {}
