# SPDX-License-Identifier: Apache-2.0
"""FoCa's forecast, one property at a time; its law is transcribed in `numpy_forecasts`."""

from __future__ import annotations

import pytest

from freewheel.policies.decision_loop import DecisionLoop, DecisionRecord
from freewheel.policies.setting import CacheSetting, GuardSetting


def records(
    steps: int, exact: list[int] | None = None, **parameters: object
) -> list[DecisionRecord]:
    setting = CacheSetting(
        policy="foca", parameters=parameters, guard=GuardSetting(exact_steps=exact or [])
    )
    law = DecisionLoop.eager(setting, step_count=steps)
    return [law.decide() for _ in range(steps)]


def test_first_of_every_interval_is_computed() -> None:
    assert [t for t, r in enumerate(records(10, interval=3)) if r.compute] == [0, 3, 6, 9]


def test_one_residual_is_held() -> None:
    assert [r.mix for r in records(4)[1:]] == [[1] + [0] * 7] * 3


def test_both_trends_are_followed_by_halves() -> None:
    # Steps 0 and 1 computed, so P − P′ = F − F′ at step 2: F + (F − F′).
    found = records(6, exact=[1], interval=8)
    assert found[2].mix[:3] == pytest.approx([2, -1, 0])
    # Then P = 2F − F′ and P′ = F: again F − F′, two steps ahead: F + 2 (F − F′).
    assert found[3].mix[:3] == pytest.approx([3, -2, 0])
    assert found[4].mix[:3] == pytest.approx([4, -3, 0])


def test_beyond_three_steps_the_forecast_turns_back() -> None:
    found = records(9, exact=[1], interval=9)
    # Four ahead: P − P′ is still F − F′, so 3/4 of the forecast at 3 and 1/4 of F.
    assert found[5].mix[:3] == pytest.approx([3.25, -2.25, 0])
    # Five ahead P − P′ is −0.75 (F − F′): the trend is an eighth of what it was.
    assert found[6].mix[:2] == pytest.approx([1 + 0.9 * 0.25, -0.9 * 0.25])


def test_a_forecast_reaches_back_over_computed_steps() -> None:
    found = records(6, exact=[1], interval=3)
    # Step 2 was 2F − F′ of steps 1 and 0; seen from step 3 that is 2 r_1 − r_0.
    # Step 4: r_3 + ½ ((r_3 − r_1) + (r_3 − 2 r_1 + r_0)).
    assert found[4].mix[:4] == pytest.approx([2, -1.5, 0.5, 0])


def test_what_is_no_longer_kept_goes_to_the_oldest_that_is() -> None:
    found = records(6, exact=[1], interval=3, history=2)
    assert found[4].mix[:3] == pytest.approx([2, -1, 0])
    reused = [r for r in records(40, interval=3, history=3) if not r.compute]
    assert all(sum(r.mix) == pytest.approx(1) for r in reused)
