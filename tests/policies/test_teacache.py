# SPDX-License-Identifier: Apache-2.0
"""TeaCache's decisions, one behaviour at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import assert_equals_reference, fold, random_run

from freewheel.configs.load import load_config, shipped_configs
from freewheel.policies import policy_class
from freewheel.policies.decision_loop import DecisionLoop
from freewheel.policies.setting import CacheSetting, GuardSetting

TRACE = Path(__file__).parents[1] / "traces" / "shapes_wan_timesteps_30.npz"


def tea(threshold: float, coefficients: list[float] | None = None, **guard: int) -> CacheSetting:
    return CacheSetting(
        policy="teacache",
        parameters={"threshold": threshold, "coefficients": coefficients or [1.0, 0.0]},
        guard=GuardSetting(**guard),
    )


def decisions(setting: CacheSetting, signals: np.ndarray) -> list[bool]:
    law = DecisionLoop.eager(setting, step_count=len(signals))
    return [law.decide(signal[None]).compute for signal in signals]


def ramp(*values: float) -> np.ndarray:
    return np.array(values, np.float32)[:, None] * np.ones(4, np.float32)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 999), coefficients=st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=6)
)
def test_threshold_0_never_reuses(seed: int, coefficients: list[float]) -> None:
    run = random_run(seed, 8)
    assert all(
        r.compute for r in fold(DecisionLoop.eager(tea(0.0, coefficients), step_count=8), run)
    )


def test_reuse_stops_when_accumulated_distance_passes_threshold() -> None:
    # Each step moves by 10 % of the one before; two fit below 0.25, the third passes it.
    signals = ramp(*(1.1**t for t in range(8)))
    assert decisions(tea(0.25), signals) == [True, False, False, True, False, False, True, False]


def test_distance_is_measured_from_the_previous_step_and_not_the_last_computed() -> None:
    # Back and forth: never far from the computed step, but moving at every step.
    signals = ramp(1, 1.1, 1, 1.1, 1)
    assert decisions(tea(0.25), signals) == [True, False, False, True, False]


def test_distance_equal_to_the_threshold_computes() -> None:
    assert decisions(tea(0.5), ramp(1, 1.5, 1.5)) == [True, True, False]


def test_exact_steps_reset_the_distance() -> None:
    setting = tea(0.25)
    forced = setting.model_copy(update={"guard": GuardSetting(exact_steps=[2])})
    signals = ramp(*(1.1**t for t in range(6)))
    assert decisions(setting, signals) == [True, False, False, True, False, False]
    assert decisions(forced, signals) == [True, False, True, False, False, True]


def test_polynomial_is_evaluated_highest_power_first() -> None:
    # 2·x² + 0.5·x at x = 0.5 is 0.75.
    law = DecisionLoop.eager(tea(9.0, [2.0, 0.5, 0.0]), step_count=2)
    law.decide(ramp(1))
    assert law.decide(ramp(1.5)).distance == pytest.approx(0.75)


def test_all_zero_signal_computes() -> None:
    assert decisions(tea(9.0, [-1.0, 0.0]), ramp(1, 0, 0, 1, 1)) == [True, False, True, True, False]


def test_step_after_a_signal_that_is_not_finite_computes_and_recovers() -> None:
    signals = ramp(1, 1, np.nan, 1, 1)
    assert decisions(tea(0.25), signals) == [True, False, True, True, False]


def test_reset_forgets() -> None:
    run = random_run(3, 20)
    law = DecisionLoop.eager(tea(0.4), step_count=20)
    first = fold(law, run)
    law.reset()
    assert fold(law, run) == first
    assert {r.compute for r in first} == {True, False}


def looks_at_timesteps(name: str) -> bool:
    """Tell whether a config's signal is a table of the run, which the recorded trace holds."""
    return load_config(name).setting().signal in ("temb", "timestep_proj")


@pytest.mark.parametrize("name", filter(looks_at_timesteps, shipped_configs()))
def test_shipped_configs_decide_as_the_transcription_on_a_recorded_signal(name: str) -> None:
    setting = load_config(name).setting()
    with np.load(TRACE) as trace:
        signals = trace[setting.signal][:, None]
    law = DecisionLoop.eager(setting, step_count=len(signals))
    records = [law.decide(signal) for signal in signals]
    run = {"signal": signals, "residual": random_run(0, len(signals))["residual"]}
    parameters = policy_class(setting.policy).spec.resolve(setting.parameters)
    assert_equals_reference(records, setting, parameters, run)


@pytest.mark.parametrize("name", ["shapes_wan_teacache", "shapes_wan_custom"])
def test_demo_thresholds_reuse_half_of_the_steps(name: str) -> None:
    with np.load(TRACE) as trace:
        assert sum(decisions(load_config(name).setting(), trace["temb"])) == 15
