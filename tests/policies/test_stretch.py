# SPDX-License-Identifier: Apache-2.0
"""How a run lies over tables that were made for another one."""

from __future__ import annotations

import pytest

from freewheel.policies.schedule import Schedule
from freewheel.policies.setting import CacheSetting
from freewheel.policies.stretch import Stretch, stretch_of

LEVELS = [1 - step / 20 for step in range(20)]


def solved(**more: object) -> CacheSetting:
    return CacheSetting(policy="solved", parameters={"steps": 20, **more})


def test_settings_without_tables_are_stretched_nowhere() -> None:
    assert stretch_of(CacheSetting(policy="teacache"), Schedule.even(30)) is None


@pytest.mark.parametrize(
    ("steps", "says"),
    [
        (20, None),
        (
            18,
            "made for 20 steps and are stretched from 20 to 18, 10% away: calibrate again with --st",
        ),
        (40, "stretched from 20 to 40, 100% away: expect somewhat less quality"),
        (41, "stretched from 20 to 41, 105% away: calibrate again"),
    ],
)
def test_the_distance_is_told(steps: int, says: str | None) -> None:
    for setting in (
        solved(),
        solved(sigmas=LEVELS),
        CacheSetting(policy="magcache", branches={"cond": {"steps": 20}}),
    ):
        found = stretch_of(setting, Schedule.even(steps))
        assert found is not None
        assert found.is_whole == (steps == 20)
        texts = found.warnings()
        assert len(texts) == (says is not None)
        assert says is None or says in texts[0]


def test_a_run_that_begins_in_the_midst_is_compared_with_the_steps_from_there_on() -> None:
    rest = Schedule.of(500.0 - 50 * step for step in range(10))
    found = stretch_of(solved(sigmas=LEVELS), rest)
    assert found == Stretch("solved", 20, 10, 10)
    assert found.warnings() == []
    assert not found.is_whole, "a bound holds for whole runs"
    assert stretch_of(solved(), rest) == Stretch("solved", 20, 0, 10), "no noise levels are known"
    shorter = stretch_of(solved(sigmas=LEVELS), Schedule.of((500.0, 400.0, 300.0, 200.0, 100.0)))
    assert shorter is not None
    (text,) = shorter.warnings()
    assert "of which the run begins at step 10, and are stretched from 10 to 5, 50% away" in text
