# SPDX-License-Identifier: Apache-2.0
"""Schedules are chosen and improved on the runs that they themselves make."""

from __future__ import annotations

from typing import Any

from freewheel.tuning.lockstep import Lockstep
from freewheel.tuning.search import candidates, search

COUNT = 8
GUIDANCE = {"cond": 3.0, "uncond": -2.0}


def test_the_schedule_whose_run_is_nearest_is_chosen(lockstep: Lockstep, recorded: Any) -> None:
    grams = recorded.recorder.grams()
    schedules = {*candidates(grams, GUIDANCE, recorded.sigmas, history=4)[COUNT].values()}
    assert len(schedules) > 1
    alone = {schedule: search(lockstep, [schedule], rounds=0).error for schedule in schedules}
    found = search(lockstep, schedules, rounds=0)
    assert found.computed == min(alone, key=lambda schedule: alone[schedule])
    assert found.error == min(alone.values())


def test_steps_are_moved_until_the_run_is_nearer(lockstep: Lockstep) -> None:
    poor = (0, 1, 2, 3, 4, 5, 6, 19)
    found = search(lockstep, [poor], rounds=2)
    assert found.error < search(lockstep, [poor], rounds=0).error - 0.5
    assert len(found.computed) == COUNT
    for rows in found.mix.values():
        assert [t for t, row in enumerate(rows) if not row] == list(found.computed)
        assert max(len(row) for row in rows) <= 4
