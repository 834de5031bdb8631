# SPDX-License-Identifier: Apache-2.0
"""A sampler's factors: how a step adds them up, and how bundles store them."""

from __future__ import annotations

import numpy as np
import torch

from freewheel.bundle.sampler_table import SamplerTable

A = np.array([[1.0, 9.0], [0.5, 0.25]])
B = np.array([[-2.0, 9.0], [4.0, 0.125]])
TABLE = SamplerTable(np.array([1000.0, 500.0]), np.array([1.0, 0.5]), A, B)


def test_a_step_adds_as_many_of_the_past_as_there_are_newest_first() -> None:
    samples, outputs = [torch.tensor([3.0])], [torch.tensor([5.0])]
    samples.append(TABLE.advance(0, samples, outputs))
    assert samples[-1].tolist() == [3 - 2 * 5]
    outputs.append(torch.tensor([7.0]))
    assert TABLE.advance(1, samples, outputs).tolist() == [0.5 * -7 + 0.25 * 3 + 4 * 7 + 0.125 * 5]
    assert TABLE.advance(1, samples, outputs).dtype == torch.float32


def test_sums_are_of_float64() -> None:
    ones = SamplerTable(np.zeros(2), np.zeros(2), np.ones((2, 2)), np.zeros((2, 2)))
    samples = [torch.tensor([1.0]), torch.tensor([2.0**24])]
    nothing = [torch.zeros(1)] * 2
    huge = [torch.tensor([-(2.0**24)]), torch.tensor([2.0**24 + 2])]
    assert ones.advance(1, samples, nothing).item() == 2.0**24
    assert ones.advance(1, huge, nothing).item() == 2.0


def test_what_is_stored_comes_back() -> None:
    packed = TABLE.packed()
    assert packed.shape == (2, 2 + 2 * TABLE.window)
    again = SamplerTable.of(packed)
    for name, matrix in vars(TABLE).items():
        np.testing.assert_array_equal(vars(again)[name], matrix)
