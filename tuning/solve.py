# SPDX-License-Identifier: Apache-2.0
"""Solve for schedules: which steps to compute, and how to mix residuals on the others.

Least squares gives the best mix of every reused step for every choice of computed steps behind
it, and its error; dynamic programming over the gaps between computed steps then finds, for each
number of computed steps, the schedule of least weighted error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise, product

import numpy as np
from numpy.typing import NDArray

from .gram import Grams

__all__ = ["Solution", "early_weights", "solve"]

Array = NDArray[np.float64]
Gaps = tuple[int, ...]

RIDGE = 1e-5
"""Pull of every mix towards holding the newest residual, relative to the vectors' mean square."""

EARLY = 2.7
"""Orders of magnitude by which an error at the first step counts more than one at the last."""


@dataclass(frozen=True)
class Solution:
    """One schedule.

    Attributes:
        computed: Indices of the computed steps, ascending.
        mix: Per branch, one row per step: factors of past residuals, newest first; empty where the
            step is computed.
        error: What was minimised: from `solve`, the sum of the weighted mean squares of the model
            output's error, per run; from `search`, the final sample's distance in dB.
        distances: From `search`, that distance of every run.
    """

    computed: tuple[int, ...]
    mix: Mapping[str, list[list[float]]]
    error: float
    distances: tuple[float, ...] = ()


def early_weights(sigmas: NDArray[np.floating], earliness: float = EARLY) -> Array:
    """Return how much the final sample suffers from an error of each step's output, [steps].

    An Euler step carries an error on by its share of sigma; what follows amplifies early errors,
    which decide what is drawn, more than late ones. The second factor is a measured compromise
    (docs/explanation/caching.md).

    Args:
        sigmas: Noise levels [steps + 1], descending to 0.
        earliness: Orders of magnitude from the last step to the first.
    """
    steps = len(sigmas) - 1
    early = 10.0 ** (earliness * (1 - np.arange(steps) / steps))
    return np.asarray(np.diff(sigmas) ** 2 * early, dtype=np.float64)


def solve(
    grams: Grams,
    guidance: Mapping[str, float],
    weights: Array,
    *,
    history: int = 3,
    longest_gap: int = 8,
) -> dict[int, Solution]:
    """Find the best schedule for every number of computed steps.

    Args:
        grams: Of uncached runs.
        guidance: Factor of each branch's output in the guided one: ``{"cond": g, "uncond": 1 − g}``;
            branches are solved together, so that their errors may cancel.
        weights: What a squared error of the guided output costs at each step, [steps].
        history: Residuals that a mix uses at most.
        longest_gap: Steps from one computed step to the next, at most.

    Returns:
        By number of computed steps; numbers too low for ``longest_gap`` are missing.
    """
    assert history * longest_gap - 1 >= 1, "some reuse is wanted"
    problem = _Problem(grams, guidance)
    search = _Search(problem, weights, history, min(longest_gap, grams.window))
    return {
        count: _solution(problem, weights, computed, history) for count, computed in search.best()
    }


class _Problem:
    """Least squares over the guided output: target and candidates as columns of one Gram matrix."""

    def __init__(self, grams: Grams, guidance: Mapping[str, float]) -> None:
        self.branches, self.window, self.steps = grams.branches, grams.window, grams.steps
        width = grams.window + 1
        combine = np.zeros((1 + len(self.branches) * self.window, len(self.branches) * width))
        for index, name in enumerate(self.branches):
            own = index * width
            combine[0, own] = guidance[name]
            for lag in range(1, width):
                # L(r_{t−lag}) = L(r_t) + L(r_{t−lag} − r_t)
                combine[index * self.window + lag, [own, own + lag]] = guidance[name]
        self.values = combine @ (grams.values / grams.runs) @ combine.T

    def fit(self, step: int, lags: NDArray[np.int64]) -> tuple[Array, Array]:
        """Return mixes [cases, branches · k] and errors [cases] of residuals ``lags`` steps back.

        Args:
            step: Target.
            lags: [cases, k], steps from the target back to each residual, newest first.
        """
        count = len(self.branches)
        columns = np.concatenate([b * self.window + lags for b in range(count)], axis=1)
        gram = self.values[step]
        inner = gram[columns[:, :, None], columns[:, None, :]]
        aim = gram[0, columns]
        held = np.zeros(columns.shape[1])
        held[:: lags.shape[1]] = 1
        pull = RIDGE * np.trace(inner, axis1=1, axis2=2) / columns.shape[1]
        eased = inner + pull[:, None, None] * np.eye(columns.shape[1])
        moved = np.linalg.solve(eased, (aim - inner @ held)[:, :, None])[:, :, 0]
        mix = held + moved
        error = gram[0, 0] - 2 * (mix * aim).sum(1) + np.einsum("ci,cij,cj->c", mix, inner, mix)
        return mix, np.maximum(error, 0.0)


class _Search:
    """Dynamic programming over (newest computed step, gaps before it)."""

    def __init__(self, problem: _Problem, weights: Array, history: int, longest: int) -> None:
        self.steps, self.longest = problem.steps, longest
        self.gaps = [
            g for g in product(range(longest + 1), repeat=history - 1) if _is_contiguous(g)
        ]
        self.index = {g: i for i, g in enumerate(self.gaps)}
        self.cost = self._segment_costs(problem, weights)

    def _segment_costs(self, problem: _Problem, weights: Array) -> Array:
        """Return the cost of reusing r steps after a computed one, [steps, gaps, r]."""
        error = np.full((self.steps, len(self.gaps), self.longest - 1), np.inf)
        by_depth: dict[int, list[int]] = {}
        for index, gaps in enumerate(self.gaps):
            by_depth.setdefault(sum(g > 0 for g in gaps), []).append(index)
        for depth, indices in by_depth.items():
            past = np.array([self.gaps[i][:depth] for i in indices], dtype=np.int64)
            behind = np.cumsum(past.reshape(len(indices), depth), axis=1)
            for step in range(1, self.steps):
                for ahead in range(1, min(self.longest - 1, step) + 1):
                    newest = np.full((len(indices), 1), ahead)
                    lags = np.concatenate([newest, ahead + behind], axis=1)
                    fits = lags.max(axis=1) <= min(problem.window, step)
                    if fits.any():
                        found = problem.fit(step, lags[fits])[1] * weights[step]
                        error[step - ahead, np.array(indices)[fits], ahead - 1] = found
        none = np.zeros((self.steps, len(self.gaps), 1))
        return np.concatenate([none, np.cumsum(error, axis=2)], axis=2)

    def best(self) -> list[tuple[int, tuple[int, ...]]]:
        """Return the best computed steps for each number of them."""
        start = (0,) * len(self.gaps[0])
        shape = (self.steps, len(self.gaps), self.steps + 1)
        cost, before = np.full(shape, np.inf), np.full((*shape, 2), -1)
        cost[0, self.index[start], 1] = 0.0
        ends: dict[int, tuple[float, int, int]] = {}
        for step in range(self.steps):
            for index, gaps in enumerate(self.gaps):
                so_far = cost[step, index]
                if not np.isfinite(so_far).any():
                    continue
                for reused in range(min(self.longest, self.steps - step)):
                    total = so_far + self.cost[step, index, reused]
                    following = step + reused + 1
                    if following == self.steps:
                        for count in map(int, np.flatnonzero(total < np.inf)):
                            if count not in ends or total[count] < ends[count][0]:
                                ends[count] = (float(total[count]), step, index)
                        break
                    target = self.index[((reused + 1, *gaps)[: len(gaps)])]
                    shifted = np.concatenate([[np.inf], total[:-1]])
                    better = shifted < cost[following, target]
                    cost[following, target, better] = shifted[better]
                    before[following, target, better] = (step, index)
        return [(count, self._walk(before, *ends[count][1:], count)) for count in sorted(ends)]

    @staticmethod
    def _walk(before: NDArray[np.int64], step: int, index: int, count: int) -> tuple[int, ...]:
        """Follow a schedule back from its last computed step."""
        computed = [step]
        while step > 0:
            step, index = (int(i) for i in before[step, index, count])
            computed.insert(0, step)
            count -= 1
        return tuple(computed)


def _is_contiguous(gaps: Gaps) -> bool:
    """Tell whether no gap follows one that does not exist (0)."""
    return all(newer > 0 or older == 0 for newer, older in pairwise(gaps))


def _solution(
    problem: _Problem, weights: Array, computed: tuple[int, ...], history: int
) -> Solution:
    """Fit every reused step of a schedule."""
    rows: dict[str, list[list[float]]] = {name: [] for name in problem.branches}
    total = 0.0
    for step in range(problem.steps):
        if step in computed:
            for table in rows.values():
                table.append([])
            continue
        past = [s for s in reversed(computed) if s < step and step - s <= problem.window]
        lags = np.array([[step - s for s in past[:history]]])
        mix, error = problem.fit(step, lags)
        total += float(error[0] * weights[step])
        for table, row in zip(rows.values(), np.split(mix[0], len(rows)), strict=True):
            table.append([round(float(f), 6) for f in row])
    return Solution(computed, rows, total)
