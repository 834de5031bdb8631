# SPDX-License-Identifier: Apache-2.0
"""Custom decides as TeaCache and follows the last trend, in part."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy_reference as reference
import pytest
from runs import assert_equals_law, fold, forecasts, random_run

from freewheel.configs.load import load_config, parse_config
from freewheel.policies.custom import DAMPED, Custom
from freewheel.policies.decision_loop import DecisionLoop, DecisionRecord
from freewheel.policies.setting import CacheSetting

TRACE = Path(__file__).parents[1] / "traces" / "shapes_wan_timesteps_30.npz"


def test_custom_decides_as_teacache() -> None:
    run = random_run(5, 40)
    parameters = {"threshold": 0.5}
    custom, tea = (
        fold(DecisionLoop.eager(CacheSetting(policy=p, parameters=parameters), step_count=40), run)
        for p in ("custom", "teacache")
    )
    assert [(r.compute, r.distance) for r in custom] == [(r.compute, r.distance) for r in tea]
    assert {r.compute for r in custom} == {True, False}


SIGNALS = np.array([1, 1, 1, 9, 9, 9], np.float32)[:, None, None] * np.ones((1, 4), np.float32)
"""The change doubles the distance at step 3, so that steps 0 and 3 are computed."""


def decide(**parameters: float) -> list[DecisionRecord]:
    setting = CacheSetting(policy="custom", parameters={"threshold": 0.5, **parameters})
    law = DecisionLoop.eager(setting, step_count=6)
    return [law.decide(signal) for signal in SIGNALS]


def test_published_form_holds_with_one_residual_and_extrapolates_with_two() -> None:
    records = decide(trend=1.0, trend_decay=1.0)
    assert [r.compute for r in records] == [True, False, False, True, False, False]
    assert records[2].mix == [1, 0]
    np.testing.assert_allclose(records[4].mix, [1 + 1 / 3, -1 / 3], rtol=1e-6)
    np.testing.assert_allclose(records[5].mix, [1 + 2 / 3, -2 / 3], rtol=1e-6)


def test_trend_is_followed_in_part_and_less_the_farther_it_reaches() -> None:
    records = decide(trend=0.6, trend_decay=0.5)
    np.testing.assert_allclose(records[4].mix, [1 + 0.3 / 3, -0.3 / 3], rtol=1e-6)
    np.testing.assert_allclose(records[5].mix, [1 + 0.15 * 2 / 3, -0.15 * 2 / 3], rtol=1e-6)


def test_without_a_trend_it_is_teacache() -> None:
    assert [r.mix for r in decide(trend=0.0) if not r.compute] == [[1, 0]] * 4


RET, PLAIN = [2.0, 0.01], [1.5, 0.2, 0.005]
"""Polynomials: with ``use_ret_steps``, without."""


def foreign(use_ret_steps: bool, threshold: float) -> CacheSetting:
    """Return what a file with LightX2V's keys alone resolves to."""
    keys = {"coefficients": [RET, PLAIN], "use_ret_steps": use_ret_steps}
    data = {"feature_caching": "Custom", "teacache_thresh": threshold, **keys, "infer_steps": 30}
    return parse_config(data, where="wan_t2v_custom.json").setting()


@pytest.mark.parametrize("use_ret_steps", [True, False])
@pytest.mark.parametrize("source", ["recorded", *range(4)])
def test_a_lightx2v_file_runs_the_published_law(source: int | str, use_ret_steps: bool) -> None:
    run = random_run(7 if source == "recorded" else source, 30)
    if source == "recorded":
        tables = np.load(TRACE)
        signal = tables["timestep_proj" if use_ret_steps else "temb"]
        run["signal"] = signal.reshape(len(signal), 1, -1)
    threshold = 0.3 if source == "recorded" else 0.6
    setting = foreign(use_ret_steps, threshold)
    law = reference.PublishedCustom(threshold, [RET, PLAIN], use_ret_steps, 30)
    records = fold(DecisionLoop.eager(setting, step_count=30), run)
    assert {r.compute for r in records} == {True, False}
    assert_equals_law(records, Custom.spec, law, reference.Guard(), run)
    # The damped form of the same decisions reuses something else.
    damped = setting.model_copy(update={"parameters": {**setting.parameters, **DAMPED}})
    others = forecasts(fold(DecisionLoop.eager(damped, step_count=30), run), run["residual"])
    reused = forecasts(records, run["residual"])
    pairs = [(a, b) for a, b in zip(reused, others, strict=True) if a is not None]
    assert any(not np.allclose(a, b, rtol=1e-3) for a, b in pairs)


SHIPPED = [
    f"wan_{name}"
    for name in ("t2v_custom_1_3b", "t2v_custom_14b", "i2v_custom_480p", "i2v_custom_720p")
]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_files_of_lightx2v_run_the_published_form(name: str) -> None:
    parameters = Custom.spec.resolve(load_config(name).setting().parameters)
    assert (parameters["trend"], parameters["trend_decay"]) == (1, 1)
    assert Custom.mix.form(parameters) == "published forecast"


@pytest.mark.parametrize("name", ["custom", "shapes_wan_custom"])
def test_the_policy_by_name_and_the_demo_run_the_damped_form(name: str) -> None:
    parameters = Custom.spec.resolve(load_config(name).setting().parameters)
    assert (parameters["trend"], parameters["trend_decay"]) == (0.65, 0.8)
    assert Custom.mix.form(parameters) == "damped forecast, trend 0.65, trend_decay 0.8"


def test_without_a_trend_no_form_is_claimed() -> None:
    assert Custom.mix.form({"trend": 0.0, "trend_decay": 1.0}) == "no forecast, holds"
