# SPDX-License-Identifier: Apache-2.0
"""Symbolic sizes are made anew of a segment's own inputs."""

from __future__ import annotations

import pytest
import sympy
import torch
from cases import traced
from torch import fx, nn

from freewheel.compiler.cut.row import step
from freewheel.compiler.cut.sizes import SizeMaker, line, shape_donors
from freewheel.compiler.cut.trace import Trace, value_of
from freewheel.compiler.cut.words import expression_of, is_operation


@pytest.fixture(scope="module")
def found() -> Trace:
    """Images of 2 × 2 patches, and their tokens."""
    return traced(
        lambda x: x.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).flatten(2),
        x=step("batch 4 2*height 2*width"),
    )


def test_a_line_in_one_symbol_is_recognised() -> None:
    n = sympy.Symbol("n", integer=True)
    assert line(3 * n + 2) == (n, 3, 2)
    assert line(n) == (n, 1, 0)
    assert line(n * n) is None
    assert line(n * sympy.Symbol("m", integer=True)) is None


def test_a_composite_size_stands_for_itself_and_others_are_solved(found: Trace) -> None:
    (image,) = found.inputs
    tokens = [node for node in found.graph.nodes if is_operation(node)][-1]
    product = expression_of(value_of(tokens).shape[2])
    height = expression_of(value_of(image).shape[2])
    graph = fx.Graph()
    inputs = {tokens: graph.placeholder("tokens"), image: graph.placeholder("image")}
    make = SizeMaker(graph, inputs)
    graph.output((make(product + 1), make(height), make(height), make(sympy.Integer(3))))
    module = fx.GraphModule(nn.Module(), graph)
    assert module(torch.zeros(1, 4, 24), torch.zeros(1, 4, 6, 4)) == (25, 6, 6, 3)
    assert sum("sym_size" in str(node.target) for node in graph.nodes) == 2


def test_a_donor_is_taken_only_for_what_no_input_has(found: Trace) -> None:
    (image,) = found.inputs
    height = expression_of(value_of(image).shape[2])
    assert shape_donors([height], [image], found.inputs) == []
    assert shape_donors([height], [], found.inputs) == [image]


def test_a_size_that_nothing_has_is_named(found: Trace) -> None:
    with pytest.raises(LookupError, match="nowhere"):
        shape_donors([sympy.Symbol("nowhere")], [], found.inputs)


def test_every_function_of_a_size_is_computed() -> None:
    found = traced(
        lambda x: torch.ones((x.shape[1] * 3 + 1) // 2 % 5 + torch.sym_max(x.shape[0], 2) ** 2),
        x=step("batch tokens"),
    )
    (x,) = found.inputs
    expression = expression_of(value_of(found.results[0]).shape[0])
    graph = fx.Graph()
    graph.output(SizeMaker(graph, {x: graph.placeholder("x")})(expression))
    module = fx.GraphModule(nn.Module(), graph)
    for batch, tokens in ((1, 4), (3, 9)):
        assert module(torch.zeros(batch, tokens)) == (tokens * 3 + 1) // 2 % 5 + max(batch, 2) ** 2
