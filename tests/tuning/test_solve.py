"""Solved schedules: the search against brute force, and mixes against known trajectories."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from freewheel.tuning.gram import Grams
from freewheel.tuning.solve import early_weights, solve

BRANCHES = ("cond", "uncond")
GUIDANCE = {"cond": 3.0, "uncond": -2.0}


def grams_of(residuals: dict[str, np.ndarray], window: int) -> Grams:
    """Return the inner products of trajectories [steps, size] whose finish is the identity."""
    steps = len(next(iter(residuals.values())))
    values = []
    for t in range(steps):
        rows = []
        for r in residuals.values():
            past = [r[t - lag] - r[t] if lag <= t else 0 * r[t] for lag in range(1, window + 1)]
            rows += [r[t], *past]
        stacked = np.stack(rows)
        values.append(stacked @ stacked.T / stacked.shape[1])
    return Grams(tuple(residuals), window, np.stack(values), runs=1)


def smooth(seed: int, steps: int, size: int = 40) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    walks = {}
    for name in BRANCHES:
        pace = np.cumsum(rng.standard_normal((steps, size)) * 0.2, axis=0)
        walks[name] = np.cumsum(pace, axis=0) + 3 * rng.standard_normal(size)
    return walks


def cost_of(
    residuals: dict[str, np.ndarray], computed: tuple[int, ...], weights: np.ndarray, history: int
) -> float:
    """Return the weighted error of a schedule with the best mixes, by NumPy's least squares."""
    total = 0.0
    for t in range(len(weights)):
        if t in computed:
            continue
        past = [s for s in reversed(computed) if s < t][:history]
        columns = [GUIDANCE[n] * r[s] for n, r in residuals.items() for s in past]
        target = sum(GUIDANCE[n] * r[t] for n, r in residuals.items())
        mix, *_ = np.linalg.lstsq(np.stack(columns, 1), target, rcond=None)
        error = np.stack(columns, 1) @ mix - target
        total += weights[t] * float(np.square(error).mean())
    return total


@pytest.mark.parametrize("seed", range(3))
def test_search_finds_what_brute_force_finds(seed: int) -> None:
    steps = 9
    residuals, weights = smooth(seed, steps), np.linspace(2.0, 0.5, 9)
    found = solve(grams_of(residuals, 8), GUIDANCE, weights, history=2, longest_gap=9)
    for count in (3, 4, 6):
        schedules = [(0, *rest) for rest in combinations(range(1, steps), count - 1)]
        best = min(cost_of(residuals, s, weights, 2) for s in schedules)
        assert found[count].error == pytest.approx(best, rel=2e-2, abs=1e-3)
        assert cost_of(residuals, found[count].computed, weights, 2) <= best * 1.02 + 1e-3


def test_a_trajectory_that_repeats_a_law_is_forecast_exactly() -> None:
    """Residuals r_t = a·2^t + b·(−1)^t obey one recurrence: two residuals tell every other."""
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 30))
    t = np.arange(12)[:, None]
    walks = {n: a * 1.2**t * s + b * (0.8**t) for n, s in (("cond", 1.0), ("uncond", 0.7))}
    solution = solve(grams_of(walks, 8), GUIDANCE, np.ones(12), history=2, longest_gap=6)[4]
    target = sum(GUIDANCE[n] * r for n, r in walks.items())
    for step, rows in enumerate(zip(*solution.mix.values(), strict=True)):
        if step in solution.computed or step < solution.computed[1]:
            continue
        past = [s for s in reversed(solution.computed) if s < step][:2]
        guided = sum(
            GUIDANCE[n] * sum(f * r[s] for f, s in zip(row, past, strict=True))
            for (n, r), row in zip(walks.items(), rows, strict=True)
        )
        np.testing.assert_allclose(guided, target[step], rtol=0.02, atol=0.02)


def test_solution_is_never_worse_than_holding_or_extrapolating_its_own_schedule() -> None:
    residuals = smooth(5, 16)
    grams, weights = grams_of(residuals, 15), np.ones(16)
    for solution in solve(grams, GUIDANCE, weights, history=3).values():
        computed = solution.computed
        plain = {"hold": 0.0, "taylor": 0.0}
        for t in set(range(16)) - set(computed):
            past = [s for s in reversed(computed) if s < t]
            ahead = (t - past[0]) / (past[0] - past[1]) if len(past) > 1 else 0.0
            older = past[1] if len(past) > 1 else past[0]
            for name, a in (("hold", 0.0), ("taylor", ahead)):
                error = sum(
                    GUIDANCE[n] * ((1 + a) * r[past[0]] - a * r[older] - r[t])
                    for n, r in residuals.items()
                )
                plain[name] += float(np.square(error).mean())
        assert solution.error <= min(plain.values()) * 1.001 + 1e-9


def test_more_computed_steps_never_cost_more() -> None:
    found = solve(grams_of(smooth(1, 20), 16), GUIDANCE, np.ones(20))
    errors = [found[count].error for count in sorted(found)]
    assert errors == sorted(errors, reverse=True)
    assert found[20].error == 0
    assert min(found) >= 3, "eight steps at most from one computed step to the next"


def test_rows_fit_the_schedule_and_the_history() -> None:
    solution = solve(grams_of(smooth(2, 20), 16), GUIDANCE, np.ones(20), history=3)[7]
    for rows in solution.mix.values():
        assert [t for t, row in enumerate(rows) if not row] == list(solution.computed)
        assert max(len(row) for row in rows) <= 3


def test_weights_are_large_early_and_where_sigma_falls_fast() -> None:
    weights = early_weights(np.array([1.0, 0.9, 0.8, 0.7, 0.0]))
    assert weights[0] > weights[1] > weights[2]
    assert weights[3] / weights[2] == pytest.approx(49 * 10 ** (-2.7 / 4))
