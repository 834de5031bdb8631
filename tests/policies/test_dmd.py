# SPDX-License-Identifier: Apache-2.0
"""DMD's forecast of what it is made for, and where it leaves it."""

from __future__ import annotations

import numpy as np
import pytest
from runs import fold, forecasts

from freewheel.policies.decision_loop import DecisionLoop
from freewheel.policies.setting import CacheSetting, GuardSetting

STEPS = 30


def swing(decay: float = 0.03, pace: float = 0.1) -> np.ndarray:
    """Two decays and a damped oscillation in 50 random directions, [steps, 50]."""
    t = np.arange(STEPS)
    courses = [np.exp(-decay * t), np.exp(-3 * decay * t)]
    courses += [np.exp(-decay * t) * wave(pace * t) for wave in (np.cos, np.sin)]
    directions = np.random.default_rng(0).standard_normal((4, 50))
    return (np.stack(courses, axis=1) @ directions).astype(np.float32)


def errors(
    residual: np.ndarray, policy: str, guard: GuardSetting | None = None, **parameters: object
) -> list[float]:
    """Return how far off each forecast of a step is, over the change since the last computed one."""
    setting = CacheSetting(policy=policy, parameters=parameters, guard=guard or GuardSetting())
    run = {"signal": np.zeros((STEPS, 1, 1)), "residual": residual}
    run["feature"] = np.zeros((STEPS, 1, 1, 1))
    records = fold(DecisionLoop.eager(setting, step_count=STEPS), run)
    found, last = [], 0
    for t, (record, mixed) in enumerate(zip(records, forecasts(records, residual), strict=True)):
        if record.compute:
            last = t
        else:
            size = np.linalg.norm(residual[t] - residual[last])
            found.append(float(np.linalg.norm(mixed - residual[t]) / size))
    return found


def test_exponentials_are_foretold_where_a_line_and_a_parabola_are_off() -> None:
    residual = swing()
    ours = errors(residual, "dmd", interval=3)[-10:]
    line = errors(residual, "taylorseer", interval=3)[-10:]
    parabola = errors(residual, "taylorseer", interval=3, order=2, variant="newton")[-10:]
    assert max(ours) < 0.02
    assert min(line) > 5 * max(ours)
    assert min(parabola) > 2 * max(ours)


def test_fewer_than_four_even_residuals_are_followed_by_the_line() -> None:
    residual = swing()
    count = 2 * 3  # steps 1, 2, 4, 5, 7, 8, with one to three residuals
    assert errors(residual, "dmd", interval=3)[:count] == pytest.approx(
        errors(residual, "taylorseer", interval=3)[:count], rel=1e-4
    )
    uneven = GuardSetting(exact_steps=[2, 10, 18, 26])  # never three equal distances
    assert errors(residual, "dmd", uneven, interval=4) == pytest.approx(
        errors(residual, "taylorseer", uneven, interval=4), rel=1e-4
    )


def test_a_forecast_that_grows_too_fast_is_left_for_the_line() -> None:
    explosion = swing(decay=-0.12)
    bounded = errors(explosion, "dmd", interval=3, farthest=1.2)
    line = errors(explosion, "taylorseer", interval=3)
    assert bounded == pytest.approx(line, rel=1e-3)
    assert np.mean(errors(explosion, "dmd", interval=3, farthest=9.0)[-6:]) < 0.2 * np.mean(
        line[-6:]
    )


def test_ridge_of_1_tends_to_holding() -> None:
    residual = swing()
    strong, weak = (errors(residual, "dmd", interval=3, ridge=r)[-6:] for r in (1.0, 1e-4))
    assert min(strong) > 2 * max(weak)


def test_a_residual_that_stays_is_held() -> None:
    residual = np.ones((STEPS, 8), np.float32)
    setting = CacheSetting(policy="dmd", parameters={"interval": 3})
    run = {"signal": residual[:, None], "residual": residual, "feature": residual[:, None, None]}
    records = fold(DecisionLoop.eager(setting, step_count=STEPS), run)
    for record, mixed in zip(records, forecasts(records, residual), strict=True):
        assert record.compute or np.allclose(mixed, 1, atol=1e-5)
