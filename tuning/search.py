# SPDX-License-Identifier: Apache-2.0
"""Search for schedules on real runs.

`solve` knows every error of an uncached run's residuals, but not what an error does to the rest of
the run: that it takes as a weight per step. So its schedules for several weights are really run, and
the best one is improved by moving one computed step at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from .gram import Grams
from .lockstep import Lockstep, Point
from .solve import Solution, early_weights, solve

__all__ = ["candidates", "search"]

EARLINESS = (1.0, 1.5, 2.0, 2.7)
"""Weights of early errors that schedules are solved for; see `early_weights`."""

HISTORIES = (2, 3)
"""Residuals of a mix that schedules are solved for; longer ones reach behind the window."""

MOVES = (1, -1, 2, -2)

PROMISE, GAIN = 0.1, 0.03
"""dB that a move must bring soon, and in the end."""

Computed = tuple[int, ...]


def candidates(
    grams: Grams,
    guidance: Mapping[str, float],
    sigmas: NDArray[np.floating],
    *,
    history: int,
    longest_gap: int = 8,
) -> dict[int, list[Computed]]:
    """Return schedules worth a run by number of computed steps.

    Args:
        grams: Of uncached runs.
        guidance: Factor of each branch's output in the guided one.
        sigmas: Noise levels [steps + 1], descending to 0.
        history: Residuals that a mix uses at most.
        longest_gap: Steps from one computed step to the next, at most.
    """
    found: dict[int, dict[Computed, None]] = {}
    for earliness in EARLINESS:
        weights = early_weights(sigmas, earliness)
        for depth in sorted({min(h, history) for h in HISTORIES}):
            solved = solve(grams, guidance, weights, history=depth, longest_gap=longest_gap)
            for count, solution in solved.items():
                found.setdefault(count, {})[solution.computed] = None
    return {count: list(schedules) for count, schedules in found.items()}


def search(lockstep: Lockstep, schedules: Iterable[Computed], *, rounds: int) -> Solution:
    """Return the best of some schedules, improved by moving computed steps.

    Args:
        lockstep: Runs to measure on.
        schedules: Equally many computed steps each.
        rounds: Times that every computed step is tried elsewhere, at most; it ends earlier where
            no move helps.

    Returns:
        Its error is the final sample's, relative, mean of all runs in dB.
    """
    best = min(
        (_solution(lockstep, computed, _end(lockstep, computed)) for computed in schedules),
        key=lambda solution: solution.error,
    )
    if not rounds:
        return best
    walk = _Walk(lockstep, frozenset(best.computed))
    for _ in range(rounds):
        if not walk.improve():
            break
    return _solution(lockstep, walk.computed, walk.points[-1])


def _end(lockstep: Lockstep, computed: Computed) -> Point:
    *_, end = lockstep.run(computed)
    return end


def _solution(lockstep: Lockstep, computed: Iterable[int], end: Point) -> Solution:
    mix = {branch: list(rows) for branch, rows in end.mix.items()}
    return Solution(tuple(sorted(computed)), mix, lockstep.distance(end))


class _Walk:
    """A schedule with all points of its runs, so that a change is run from where it begins.

    The points hold the residuals of every computed step.
    """

    def __init__(self, lockstep: Lockstep, computed: frozenset[int]) -> None:
        self._lockstep, self.computed = lockstep, computed
        self._tried = {computed}
        self.points: list[Point] = [lockstep.start, *lockstep.run(computed)]

    def improve(self) -> bool:
        """Try every computed step elsewhere; tell whether any move was taken."""
        before = self.computed
        for step in sorted(self.computed - {0}):
            for move in MOVES:
                place = step + move
                is_free = 0 < place < self._lockstep.steps and place not in self.computed
                if is_free and self._try(step, place):
                    break
        return self.computed != before

    def _try(self, step: int, place: int) -> bool:
        """Compute another step instead of one, and keep that where it is better."""
        computed = self.computed - {step} | {place}
        if computed in self._tried:
            return False
        self._tried.add(computed)
        first, last = min(step, place), max(step, place)
        # Once two more steps were computed, both runs' residuals are of like age.
        judged = [s for s in sorted(computed) if s > last][1:2]
        points = self.points[: first + 1]
        for point in self._lockstep.run(computed, points):
            points = [*points, point]
            if [len(points) - 2] == judged and not self._is_nearer(points, PROMISE):
                return False
        if not self._is_nearer(points, GAIN):
            return False
        self.computed, self.points = computed, points
        return True

    def _is_nearer(self, points: Sequence[Point], by: float) -> bool:
        distance = self._lockstep.distance
        return distance(points[-1]) < distance(self.points[len(points) - 1]) - by
