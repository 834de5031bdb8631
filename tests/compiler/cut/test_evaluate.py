# SPDX-License-Identifier: Apache-2.0
"""Parts of a graph on numbers, at the traced sizes."""

from __future__ import annotations

import torch
from cases import traced

from freewheel.compiler.cut.evaluate import Evaluator
from freewheel.compiler.cut.row import SIZES, step
from freewheel.compiler.cut.words import is_operation


def test_a_value_is_computed_at_the_traced_sizes() -> None:
    found = traced(lambda x: torch.arange(x.shape[1]).float() * 2, x=step("batch tokens"))
    evaluator = Evaluator(found)
    (result,) = found.results
    assert evaluator.knows(result)
    assert torch.equal(evaluator.values[result], torch.arange(SIZES["tokens"]).float() * 2)
    assert list(evaluator.shape(result)) == [SIZES["tokens"]]


def test_given_values_stand_for_what_they_are_given_for() -> None:
    found = traced(lambda x: x * 2 + 1, x=step("batch 4"))
    double, total = [node for node in found.graph.nodes if is_operation(node)]
    values = Evaluator(found).run([total], {double: torch.full((1, 4), 5.0)})
    assert torch.equal(values[total], torch.full((1, 4), 6.0))


def test_what_needs_weights_is_not_known() -> None:
    found = traced(lambda x: x + 1, x=step("batch 4"))
    (x,) = found.inputs
    del found.examples[x]
    assert not Evaluator(found).knows(found.results[0])
