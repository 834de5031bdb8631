# SPDX-License-Identifier: Apache-2.0
"""Mix factors of the forecasts, on even and uneven histories."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import step_at as step

from freewheel.policies.forecast_mixes import line_mix, newton_mix, taylor_mix

histories = st.sets(st.integers(0, 30), min_size=1, max_size=5).map(
    lambda s: sorted(s, reverse=True)
)


@settings(max_examples=60, deadline=None)
@given(s=st.integers(1, 60), gap=st.integers(1, 12), ahead=st.integers(1, 12))
def test_order_1_extrapolates_the_line_through_two_residuals(s: int, gap: int, ahead: int) -> None:
    gap = min(gap, s)
    slope = ahead / gap
    for mix in (taylor_mix, newton_mix):
        factors = mix(step(s + ahead, [s, s - gap]), 1)
        np.testing.assert_allclose(factors[:2], [1 + slope, -slope], rtol=1e-6)
        assert factors[2:].tolist() == [0, 0, 0]


@settings(max_examples=60, deadline=None)
@given(history=histories, ahead=st.integers(1, 5), order=st.integers(1, 4), seed=st.integers(0, 99))
def test_newton_is_exact_for_polynomials_on_uneven_gaps(
    history: list[int], ahead: int, order: int, seed: int
) -> None:
    degree = min(order, len(history) - 1)
    polynomial = np.random.default_rng(seed).uniform(-1, 1, degree + 1)
    t = history[0] + ahead
    # Centred, so that float32 factors meet values of order one.
    value = lambda at: np.polyval(polynomial, (np.asarray(at) - t) / 10)  # noqa: E731
    factors = newton_mix(step(t, history), order).double().numpy()
    mixed = (factors[: len(history)] * value(history)).sum()
    scale = np.abs(factors).sum() * np.abs(value(history)).max()
    assert abs(mixed - value(t)) <= 1e-5 * max(scale, 1)


def test_taylor_divides_each_order_by_the_newest_gap_of_its_row() -> None:
    # Steps 10, 8, 3: D1(10) = (a − b)/2, D1(8) = (b − c)/5, D2(10) = (D1(10) − D1(8))/2; t − s = 3.
    factors = taylor_mix(step(13, [10, 8, 3]), 2)
    d1, d1_before = np.array([1 / 2, -1 / 2, 0]), np.array([0, 1 / 5, -1 / 5])
    expected = np.array([1, 0, 0]) + 3 * d1 + 9 / 2 * (d1 - d1_before) / 2
    np.testing.assert_allclose(factors[:3], expected, rtol=1e-6)
    # Divided differences would divide by 10 − 3 at the second order.
    assert not np.allclose(factors, newton_mix(step(13, [10, 8, 3]), 2))


@settings(max_examples=60, deadline=None)
@given(history=histories, ahead=st.integers(1, 5), order=st.integers(1, 4))
def test_factors_sum_to_one_so_that_a_constant_residual_stays(
    history: list[int], ahead: int, order: int
) -> None:
    for mix in (taylor_mix, newton_mix):
        factors = mix(step(history[0] + ahead, history), order)
        assert float(factors.sum()) == pytest.approx(1, abs=1e-5 * float(factors.abs().sum()))


@settings(max_examples=40, deadline=None)
@given(history=histories, ahead=st.integers(1, 5), order=st.integers(1, 4))
def test_order_falls_back_to_what_the_history_has(
    history: list[int], ahead: int, order: int
) -> None:
    at = step(history[0] + ahead, history)
    for mix in (taylor_mix, newton_mix):
        reached = min(order, len(history) - 1)
        assert torch.equal(mix(at, order), mix(at, reached))
        assert mix(at, order)[reached + 1 :].abs().sum() == 0
    if len(history) == 1:
        assert taylor_mix(at, order).tolist() == [1, 0, 0, 0, 0]


def test_order_may_be_a_tensor() -> None:
    at = step(9, [7, 4, 2])
    assert torch.equal(taylor_mix(at, torch.tensor(2)), taylor_mix(at, 2))


@pytest.mark.parametrize("history", [[], [4], [9, 4], [9, 7, 2]])
def test_line_is_taylors_first_order(history: list[int]) -> None:
    at = step(12, history)
    assert torch.equal(line_mix(at), taylor_mix(at, 1))
