# SPDX-License-Identifier: Apache-2.0
"""Custom decides as TeaCache and follows the last trend, in part."""

from __future__ import annotations

import numpy as np
from runs import fold, random_run

from freewheel.configs.setting import CacheSetting
from freewheel.policies.law import DecisionRecord, Law


def test_custom_decides_as_teacache() -> None:
    run = random_run(5, 40)
    parameters = {"threshold": 0.5}
    custom, tea = (
        fold(Law.eager(CacheSetting(policy=p, parameters=parameters), step_count=40), run)
        for p in ("custom", "teacache")
    )
    assert [(r.compute, r.distance) for r in custom] == [(r.compute, r.distance) for r in tea]
    assert {r.compute for r in custom} == {True, False}


SIGNALS = np.array([1, 1, 1, 9, 9, 9], np.float32)[:, None, None] * np.ones((1, 4), np.float32)
"""The change doubles the distance at step 3, so that steps 0 and 3 are computed."""


def decide(**parameters: float) -> list[DecisionRecord]:
    setting = CacheSetting(policy="custom", parameters={"threshold": 0.5, **parameters})
    law = Law.eager(setting, step_count=6)
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
