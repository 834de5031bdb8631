# SPDX-License-Identifier: Apache-2.0
"""Paths of computed steps against brute force, where a reused step costs by the two computed before it."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
import pytest

from freewheel.tuning.lockstep import Lockstep
from freewheel.tuning.paths import best_paths, nearer_of
from freewheel.tuning.search import search

STEPS = 8


@dataclass(frozen=True)
class Place:
    """Where a made-up run stands."""

    step: int = 0
    computed: tuple[int, ...] = ()
    cost: float = 0.0
    mix: dict[str, tuple[list[float], ...]] = field(default_factory=dict)


class Costs:
    """Runs whose distance is a sum over reused steps, of [previous computed, last computed, step]."""

    steps, start = STEPS, Place()

    def __init__(self, seed: int) -> None:
        self.table = np.random.default_rng(seed).random((STEPS + 1, STEPS, STEPS))

    def advance(self, point: Place, *, compute: bool) -> Place:
        if compute:
            return Place(point.step + 1, (*point.computed, point.step), point.cost)
        *_, before, last = (-1, *point.computed)
        cost = point.cost + self.table[before, last, point.step]
        return Place(point.step + 1, point.computed, cost)

    def distances(self, point: Place) -> list[float]:
        return [point.cost]

    def cheapest(self, count: int) -> float:
        costs = []
        for rest in combinations(range(1, STEPS), count - 1):
            point = self.start
            for step in range(STEPS):
                point = self.advance(point, compute=step in (0, *rest))
            costs.append(point.cost)
        return min(costs)


@pytest.mark.parametrize("seed", range(5))
def test_paths_that_share_two_computed_steps_are_those_of_brute_force(seed: int) -> None:
    runs: Any = Costs(seed)
    found = best_paths(runs, range(1, STEPS + 1), anchors=2, longest_gap=STEPS)
    assert sorted(found) == [*range(1, STEPS + 1)]
    for count, solution in found.items():
        assert len(solution.computed) == count
        assert solution.error == pytest.approx(runs.cheapest(count))
    one: Any = best_paths(runs, [4], longest_gap=STEPS)[4]
    assert one.error >= found[4].error


def test_of_two_schedules_the_nearer_is_taken() -> None:
    runs: Any = Costs(0)
    greedy = best_paths(runs, range(2, 6), longest_gap=STEPS)
    exact = best_paths(runs, range(2, 8), anchors=2, longest_gap=STEPS)
    found = nearer_of({2: exact[2], 5: greedy[5]}, {2: greedy[2], 5: exact[5]}, objective="mean")
    assert {count: s.error for count, s in found.items()} == {c: exact[c].error for c in (2, 5)}


def test_gaps_are_no_longer_than_asked() -> None:
    runs: Any = Costs(0)
    found = best_paths(runs, [2, 3, 4], longest_gap=3)
    assert sorted(found) == [3, 4], "three gaps of three reach the end"
    for solution in found.values():
        assert max(np.diff([*solution.computed, STEPS])) <= 3


def test_a_path_of_real_runs_tells_where_its_run_ends(lockstep: Lockstep) -> None:
    found = best_paths(lockstep, [8], longest_gap=4)[8]
    again = search(lockstep, [found.computed], rounds=0)
    assert again.error == pytest.approx(found.error, abs=1e-3)
    assert again.mix == found.mix
