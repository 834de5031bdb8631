# SPDX-License-Identifier: Apache-2.0
"""Search for schedules on real runs.

`solve` knows every error of an uncached run's residuals, but not what an error does to the rest of
the run: that it takes as a weight per step. So its schedules for several weights are really run, and
the best one is improved by moving one computed step at a time. Numbers of computed steps between
two that were searched take the weights that won next to them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from .gram import Grams
from .lockstep import Lockstep, Point
from .solve import Solution, early_weights, solve

__all__ = [
    "OBJECTIVES",
    "Computed",
    "Recipe",
    "Searched",
    "candidates",
    "frontier",
    "search",
    "search_count",
]

EARLINESS = (1.0, 1.5, 2.0, 2.7)
"""Weights of early errors that schedules are solved for; see `early_weights`."""

HISTORIES = (2, 3)
"""Residuals of a mix that schedules are solved for; longer ones reach behind the window."""

MOVES = (1, -1, 2, -2)

PROMISE, GAIN = 0.1, 0.03
"""dB that a move must bring soon, and in the end."""

NEAR = -70.0
"""dB of a final sample that nothing nearer is looked for: rounding it to half precision does as much."""

Computed = tuple[int, ...]
Recipe = tuple[float, int]
"""What a schedule was solved for: the weight of early errors, and residuals of a mix."""

Searched = tuple[Recipe, Solution]
"""What `search_count` returns: the recipe that won, and its schedule."""


@dataclass(frozen=True)
class Objective:
    """What is best among runs of several prompts.

    Attributes:
        scores: What of the runs' distances is compared, in dB, first the one that counts most.
    """

    scores: Callable[[Sequence[float]], list[float]]

    def is_nearer(self, ours: Sequence[float], theirs: Sequence[float], by: float) -> bool:
        """Tell whether the first scores that differ by so many dB are lower than the others."""
        for own, other in zip(self.scores(ours), self.scores(theirs), strict=True):
            if abs(own - other) > by:
                return own < other
        return False


OBJECTIVES = {
    "mean": Objective(lambda distances: [float(np.mean(distances))]),
    "worst": Objective(lambda distances: sorted(distances, reverse=True)),
}
"""By name: the prompts' mean, or the worst prompt, then the next worst, and so on.

Reference: Gao et al. 2025, LeMiCa, arXiv 2511.00090 (lexicographic minimax).

Differs: over the prompts' final samples; theirs is over the steps of a path.
"""


def candidates(
    grams: Grams,
    guidance: Mapping[str, float],
    sigmas: NDArray[np.floating],
    *,
    history: int,
    longest_gap: int = 8,
) -> dict[int, dict[Recipe, Computed]]:
    """Return schedules worth a run by number of computed steps, and what each was solved for.

    Args:
        grams: Of uncached runs.
        guidance: Factor of each branch's output in the guided one.
        sigmas: Noise levels [steps + 1], descending to 0.
        history: Residuals that a mix uses at most.
        longest_gap: Steps from one computed step to the next, at most.
    """
    found: dict[int, dict[Recipe, Computed]] = {}
    for earliness in EARLINESS:
        weights = early_weights(sigmas, earliness)
        for depth in sorted({min(h, history) for h in HISTORIES}):
            solved = solve(grams, guidance, weights, history=depth, longest_gap=longest_gap)
            for count, solution in solved.items():
                found.setdefault(count, {})[earliness, depth] = solution.computed
    return found


def frontier(
    lockstep: Lockstep,
    schedules: Mapping[int, Mapping[Recipe, Computed]],
    wanted: Collection[int],
    *,
    rounds: int,
    objective: str = "mean",
    fewest: int = 1,
    known: Mapping[int, Searched] = MappingProxyType({}),
    done: Callable[[str], None] = lambda text: None,
) -> dict[int, Solution]:
    """Return a schedule for every number of computed steps from ``fewest`` on.

    Args:
        lockstep: Runs to measure on.
        schedules: What `candidates` found.
        wanted: Numbers of computed steps that are searched; the others are run with the recipe that
            won at the nearest of these, and with one more after the other while that is neither
            nearer than one computed step fewer nor `NEAR`.
        rounds: As in `search`.
        objective: One of `OBJECTIVES`.
        fewest: Computed steps.
        known: What `search_count` found already.
        done: Told of each number that is found.
    """
    found: dict[int, Solution] = {}
    recipes: dict[int, Recipe] = {}
    for count in sorted(set(wanted) & set(schedules)):
        recipes[count], found[count] = known.get(count) or search_count(
            lockstep, schedules[count], rounds=rounds, objective=objective
        )
        done(f"{count} of {lockstep.steps} computed")
    better = OBJECTIVES[objective].is_nearer
    for count in sorted(c for c in schedules if c >= fewest and c not in found):
        nearest = min(recipes, key=lambda known: abs(known - count), default=None)
        own = schedules[count]
        recipe = next(iter(own)) if nearest is None else recipes[nearest]
        first = own.get(recipe, next(iter(own.values())))
        fewer = found.get(count - 1)
        for computed in dict.fromkeys([first, *own.values()]):
            other = search(lockstep, [computed], rounds=0, objective=objective)
            best = found.setdefault(count, other)
            if better(other.distances, best.distances, 0.0):
                best = found[count] = other
            if fewer is None or max(best.distances) <= NEAR:
                break
            if better(best.distances, fewer.distances, 0.0):
                break
        done(f"{count} of {lockstep.steps} computed")
    return found


def search_count(
    lockstep: Lockstep,
    schedules: Mapping[Recipe, Computed],
    *,
    rounds: int,
    objective: str = "mean",
) -> Searched:
    """Return the recipe whose schedule of one number of computed steps is best, and that improved.

    Args:
        lockstep: Runs to measure on.
        schedules: What `candidates` found for the number.
        rounds: As in `search`.
        objective: One of `OBJECTIVES`.
    """
    best = search(lockstep, schedules.values(), rounds=0, objective=objective)
    recipe = next(r for r, computed in schedules.items() if computed == best.computed)
    return recipe, search(lockstep, [best.computed], rounds=rounds, objective=objective)


def search(
    lockstep: Lockstep, schedules: Iterable[Computed], *, rounds: int, objective: str = "mean"
) -> Solution:
    """Return the best of some schedules, improved by moving computed steps.

    Args:
        lockstep: Runs to measure on.
        schedules: Equally many computed steps each.
        rounds: Times that every computed step is tried elsewhere, at most; it ends earlier where
            no move helps.
        objective: One of `OBJECTIVES`.

    Returns:
        Its error is the final sample's, relative, mean of all runs in dB.
    """
    aim = OBJECTIVES[objective]
    best, *others = (
        _solution(lockstep, computed, _end(lockstep, computed))
        for computed in dict.fromkeys(schedules)
    )
    for other in others:
        if aim.is_nearer(other.distances, best.distances, 0.0):
            best = other
    if not rounds:
        return best
    walk = _Walk(lockstep, frozenset(best.computed), aim)
    for _ in range(rounds):
        if not walk.improve():
            break
    return _solution(lockstep, walk.computed, walk.points[-1])


def _end(lockstep: Lockstep, computed: Computed) -> Point:
    *_, end = lockstep.run(computed)
    return end


def _solution(lockstep: Lockstep, computed: Iterable[int], end: Point) -> Solution:
    mix = {branch: list(rows) for branch, rows in end.mix.items()}
    distances = lockstep.distances(end)
    return Solution(tuple(sorted(computed)), mix, float(np.mean(distances)), tuple(distances))


class _Walk:
    """A schedule with all points of its runs, so that a change is run from where it begins.

    The points hold the residuals of every computed step.
    """

    def __init__(self, lockstep: Lockstep, computed: frozenset[int], objective: Objective) -> None:
        self._lockstep, self.computed, self._objective = lockstep, computed, objective
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
        distances = self._lockstep.distances
        return self._objective.is_nearer(
            distances(points[-1]), distances(self.points[len(points) - 1]), by
        )
