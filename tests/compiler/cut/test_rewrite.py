# SPDX-License-Identifier: Apache-2.0
"""Rewriting a traced graph keeps fake tensors, source lines and results true."""

from __future__ import annotations

import torch
from cases import run, traced

from freewheel.compiler.cut.rewrite import infer, insert, operations, replace
from freewheel.compiler.cut.row import step
from freewheel.compiler.cut.trace import value_of


def test_a_replaced_result_is_the_new_node() -> None:
    found = traced(lambda x: torch.relu(x), x=step("batch 4"))
    ((node, name),) = list(operations(found))
    assert name == "relu"
    with found.graph.inserting_before(node):
        new = insert(found, node, torch.ops.aten.neg.default, node.args[0])
    replace(found, node, new)
    assert found.results == (new,)
    assert new.meta["stack_trace"]
    x = torch.randn(5, 4)
    assert torch.equal(run(found, x=x), -x)


def test_shapes_follow_changed_arguments() -> None:
    found = traced(lambda x: x.unsqueeze(0), x=step("batch 4"))
    ((node, _),) = list(operations(found))
    node.args = (node.args[0], 2)
    infer(found, node)
    assert [str(extent) for extent in value_of(node).shape][1:] == ["4", "1"]
