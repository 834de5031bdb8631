# SPDX-License-Identifier: Apache-2.0
"""Settings that compute what a speedup asks for."""

from __future__ import annotations

import pytest

from freewheel.policies.setting import CacheSetting
from freewheel.tuning.contest import BY_CONTENT, EVEN, by_content, even_settings, even_steps


@pytest.mark.parametrize(("count", "steps"), [(1, 8), (5, 16), (16, 16), (23, 50)])
def test_even_steps_are_as_many_as_asked_for_from_the_first_on(count: int, steps: int) -> None:
    found = even_steps(count, steps)
    assert len(found) == count
    assert found[0] == 0
    assert max(found) < steps


def test_every_forecast_is_there_at_every_speedup() -> None:
    found = dict(even_settings(50, {2.0: 2.0, 4.0: 4.17}))
    assert set(found) == {f"{policy} {x}" for policy in EVEN for x in (2, 4)}
    assert len(found["foca 4"].guard.exact_steps) == 11


def test_thresholds_are_the_nearest_to_the_wanted_count_in_few_replays() -> None:
    asked: list[float] = []

    def count(setting: CacheSetting) -> float:
        threshold = setting.parameters["threshold"]
        assert isinstance(threshold, float)
        asked.append(threshold)
        return 50 / (1 + 4 * threshold)

    ideals = {policy: {2.0: 2.0, 4.0: 4.0} for policy in BY_CONTENT}
    found = dict(by_content(count, 50, ideals, {"firstblock"}))
    assert set(found) == {"firstblock 2", "firstblock 4"}
    assert len(asked) < 16
    for name, wanted in (("firstblock 2", 25), ("firstblock 4", 12)):
        assert count(found[name]) == pytest.approx(wanted, abs=1.5)
