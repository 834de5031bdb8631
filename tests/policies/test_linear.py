# SPDX-License-Identifier: Apache-2.0
"""The small solves, compared with NumPy's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from freewheel.policies.linear import gram, solve


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 8), rows=st.integers(1, 12), seed=st.integers(0, 99))
def test_solution_of_a_ridge_system_is_numpys(size: int, rows: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    columns, right = rng.standard_normal((rows, size)), rng.standard_normal(size)
    matrix = columns.T @ columns + 0.1 * np.eye(size)
    expected = np.linalg.solve(matrix, right)
    found = solve(torch.from_numpy(matrix).float(), torch.from_numpy(right).float())
    error = np.abs(found.numpy() - expected).max() / np.abs(expected).max()
    assert error < 1e-6 * np.linalg.cond(matrix)


def test_gram_holds_the_inner_products_of_columns() -> None:
    columns = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    assert gram(columns).tolist() == [[35.0, 44.0], [44.0, 56.0]]


@pytest.mark.parametrize("matrix", [[[0.0]], [[1.0, 1.0], [1.0, 1.0]]])
def test_what_is_singular_gives_nothing_finite(matrix: list[list[float]]) -> None:
    found = solve(torch.tensor(matrix), torch.ones(len(matrix)))
    assert not bool(torch.isfinite(found).all())
