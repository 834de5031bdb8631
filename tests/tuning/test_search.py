# SPDX-License-Identifier: Apache-2.0
"""Schedules are chosen and improved on the runs that they themselves make."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, cast

import pytest

from freewheel.tuning.lockstep import Lockstep, Point
from freewheel.tuning.search import NEAR, Computed, Recipe, candidates, frontier, search

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


class Told:
    """Ends as far from the uncached run as a table says."""

    steps = 20

    def __init__(self, distances: dict[Computed, float]) -> None:
        self._distances = distances
        self.ran: list[Computed] = []

    def run(self, computed: Collection[int]) -> Iterator[Point]:
        self.ran.append(tuple(computed))
        yield Point((), tuple(computed), {}, {})

    def distances(self, point: Point) -> list[float]:
        return [self._distances[cast(Computed, point.outputs)]]


@pytest.mark.parametrize(
    ("fewer", "distances", "runs", "taken"),
    [
        (-40.0, (-41.0, -50.0, -60.0), 1, 0),  # nearer than one computed step fewer: taken at once
        (-40.0, (-39.0, -38.0, -45.0), 3, 2),  # no nearer: the others, until one is
        (-40.0, (-39.0, -41.0, -45.0), 2, 1),
        (-40.0, (-38.0, -39.0, -37.0), 3, 1),  # none is: the nearest of them
        (-80.0, (NEAR, -75.0, -90.0), 1, 0),  # nobody sees the difference
    ],
)
def test_a_budget_runs_more_recipes_only_while_they_are_no_nearer_than_a_smaller_one(
    fewer: float, distances: tuple[float, ...], runs: int, taken: int
) -> None:
    recipes: list[Recipe] = [(1.0, 2), (1.5, 2), (2.0, 2)]
    larger = {recipe: (0, 1, 2 + index) for index, recipe in enumerate(recipes)}
    lockstep = Told({(0, 1): fewer, **dict(zip(larger.values(), distances, strict=True))})
    found = frontier(cast(Lockstep, lockstep), {2: {recipes[0]: (0, 1)}, 3: larger}, {2}, rounds=0)
    assert found[3].computed == larger[recipes[taken]]
    assert lockstep.ran[-runs:] == list(larger.values())[:runs]
    assert found[2].computed == (0, 1)
