# SPDX-License-Identifier: Apache-2.0
"""Of a list of one nothing is joined, split, padded or indexed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import run, traced
from torch import Tensor

from freewheel.compiler.cut.lone import take_out_lists_of_one
from freewheel.compiler.cut.row import step
from freewheel.compiler.cut.words import is_operation, operation

ONE = step("1 tokens 4")


def of_a_list(x: Tensor) -> Tensor:
    """Compute as models do that take each sample's tensor in a list."""
    samples = [sample * 2 for sample in x.unbind(0)]
    joint = torch.cat(samples).sin()
    parts = joint.split([len(sample) for sample in samples])
    padded = torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True)
    return torch.stack([padded[i] + 1 for i in range(len(samples))])


def names(forward: Callable[[Tensor], Tensor]) -> list[str]:
    """Rewrite a function, check that it computes the same, and name its operations."""
    found = traced(forward, x=ONE)
    take_out_lists_of_one(found)
    found.graph.eliminate_dead_code()
    found.graph.lint()
    for tokens in (5, 1):
        x = torch.randn(1, tokens, 4)
        assert torch.equal(run(found, x=x), forward(x))
    return [operation(node) for node in found.graph.nodes if is_operation(node)]


def test_what_is_done_to_a_list_of_one_is_left_out() -> None:
    assert set(names(of_a_list)) <= {"add", "mul", "sin", "squeeze", "stack", "unsqueeze"}


def test_an_axis_that_goes_and_comes_back_was_never_gone() -> None:
    assert names(lambda x: torch.cat([x[0].unsqueeze(0)]) + 1) == ["add"]


@pytest.mark.parametrize(
    "forward",
    [
        lambda x: torch.cat([x, x * 2]),
        lambda x: x[:, 0],
        lambda x: x[0].unsqueeze(1),
        lambda x: torch.stack([x.sin(), x.cos()])[1],
    ],
)
def test_more_than_one_stays(forward: Callable[[Tensor], Tensor]) -> None:
    found = traced(forward, x=ONE)
    before = len(found.graph.nodes)
    take_out_lists_of_one(found)
    assert len(found.graph.nodes) == before
