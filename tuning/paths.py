# SPDX-License-Identifier: Apache-2.0
"""Dynamic programming over real runs: what a path of computed steps costs is where its run stands.

Paths that have computed equally much, and compute the same step next, are compared by how far
their samples are from the uncached ones there. The nearest goes on; the others end. What a path
costs is so never a sum over its gaps, and no weight says how much an early error counts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from .lockstep import Lockstep, Point
from .search import OBJECTIVES, Computed, Objective
from .solve import Solution

__all__ = ["best_paths", "nearer_of"]


@dataclass(frozen=True)
class _Path:
    """A path that has arrived at a step.

    Attributes:
        computed: Steps computed so far.
        point: Where its runs stand.
        distances: Of the runs there, in dB.
    """

    computed: Computed
    point: Point
    distances: list[float]


class _Arrivals:
    """The nearest path of each key."""

    def __init__(self, objective: Objective) -> None:
        self._objective = objective
        self.best: dict[Computed, _Path] = {}

    def offer(self, key: Computed, path: _Path) -> None:
        """Keep a path where it is the nearest of its key."""
        known = self.best.get(key)
        if known is None or self._objective.is_nearer(path.distances, known.distances, 0.0):
            self.best[key] = path


def best_paths(
    lockstep: Lockstep,
    counts: Collection[int],
    *,
    anchors: int = 1,
    longest_gap: int = 8,
    objective: str = "mean",
) -> dict[int, Solution]:
    """Return the best path found of each number of computed steps.

    Args:
        lockstep: Runs to measure on.
        counts: Numbers of computed steps.
        anchors: Computed steps that paths must share to be compared: the coming one, and so many
            less one before it.
        longest_gap: Steps from one computed step to the next, at most.
        objective: One of `OBJECTIVES`.

    Returns:
        By number of computed steps; errors are the final sample's, relative, mean of all runs in
        dB. Numbers too low for ``longest_gap`` are missing.

    Reference: Cui et al. 2026, DPCache, arXiv 2602.22654 (dynamic programming over computed steps,
        the cost of a gap depending on the path before it).

    Differs: theirs adds up forecast errors along uncached runs, from a table of three computed
        steps; here every path that goes on is run.
    """
    steps, aim = lockstep.steps, OBJECTIVES[objective]
    arrivals = [_Arrivals(aim) for _ in range(steps)]
    ends = _Arrivals(aim)
    arrivals[0].offer((1,), _Path((), lockstep.start, []))
    for step in range(steps):
        for path in arrivals[step].best.values():
            computed = (*path.computed, step)
            point = lockstep.advance(path.point, compute=True)
            for following in range(step + 1, min(step + longest_gap, steps) + 1):
                if following > step + 1:
                    point = lockstep.advance(point, compute=False)
                arrived = _Path(computed, point, lockstep.distances(point))
                if following == steps:
                    ends.offer((len(computed),), arrived)
                elif len(computed) < max(counts):
                    shared = computed[max(len(computed) + 1 - anchors, 0) :]
                    arrivals[following].offer((len(computed), *shared), arrived)
        arrivals[step].best.clear()
    found = {count: path for (count,), path in sorted(ends.best.items())}
    return {count: _solution(path) for count, path in found.items() if count in counts}


def nearer_of(
    solutions: Mapping[int, Solution], others: Mapping[int, Solution], *, objective: str
) -> dict[int, Solution]:
    """Return the nearer of two schedules of each number of computed steps that the first have.

    Args:
        solutions: By number of computed steps.
        others: Likewise; numbers may be missing.
        objective: One of `OBJECTIVES`.
    """
    better = OBJECTIVES[objective].is_nearer
    found = dict(solutions)
    for count, other in others.items():
        if better(other.distances, found[count].distances, 0.0):
            found[count] = other
    return found


def _solution(path: _Path) -> Solution:
    mix = {branch: list(rows) for branch, rows in path.point.mix.items()}
    return Solution(path.computed, mix, float(np.mean(path.distances)), tuple(path.distances))
