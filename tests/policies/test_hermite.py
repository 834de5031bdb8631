# SPDX-License-Identifier: Apache-2.0
"""Hermite's forecast, one property at a time; its law is transcribed in `numpy_forecasts`."""

from __future__ import annotations

import pytest

from freewheel.policies.decision_loop import DecisionLoop, DecisionRecord
from freewheel.policies.setting import CacheSetting


def records(steps: int, **parameters: object) -> list[DecisionRecord]:
    law = DecisionLoop.eager(
        CacheSetting(policy="hermite", parameters=parameters), step_count=steps
    )
    return [law.decide() for _ in range(steps)]


def test_first_of_every_interval_is_computed() -> None:
    assert [t for t, r in enumerate(records(10, interval=3)) if r.compute] == [0, 3, 6, 9]


def test_first_order_follows_twice_the_squared_scale_of_the_trend() -> None:
    # 0.5 · H_1(0.5 · 2) = 0.5 · 2 · 0.5 · 2 = 1 of the difference per step, (r_4 − r_0) / 4.
    assert records(8, order=1)[6].mix == pytest.approx([1.25, -0.25, 0, 0, 0])
    assert records(8, order=1, scale=1.0)[6].mix == pytest.approx([2.0, -1.0, 0, 0, 0])


def test_second_order_turns_back_near_the_computed_step() -> None:
    # Steps 8, 4, 0; one step ahead H_2(0.5) = 4 · 0.25 − 2 = −1, times 0.25 / 2 of D2.
    d1, d2 = [1 / 4, -1 / 4, 0], [1 / 16, -2 / 16, 1 / 16]
    expected = [n + 0.5 * a - b / 8 for n, a, b in zip([1, 0, 0], d1, d2, strict=True)]
    assert records(12)[9].mix[:3] == pytest.approx(expected)


def test_scale_0_holds() -> None:
    assert records(12, scale=0.0, order=4)[11].mix == [1, 0, 0, 0, 0]
