# SPDX-License-Identifier: Apache-2.0
"""What a node is, and what it reads."""

from __future__ import annotations

import torch
from cases import traced
from torch import fx

from freewheel.compiler.cut.row import step
from freewheel.compiler.cut.trace import Trace
from freewheel.compiler.cut.words import (
    is_operation,
    is_size,
    operation,
    sizes_of,
    sizes_read,
    tensors_read,
)


def found() -> tuple[Trace, fx.Node]:
    one = traced(lambda x: x.reshape(x.shape[0] * x.shape[1], 8), x=step("batch tokens 8"))
    (node,) = [node for node in one.graph.nodes if is_operation(node)]
    return one, node


def test_a_node_reads_tensors_and_sizes() -> None:
    one, node = found()
    (x,) = one.inputs
    assert operation(node) in ("reshape", "view")
    assert tensors_read(node) == [x]
    (product,) = sizes_read(node)
    assert product.free_symbols == sizes_of(x) == sizes_of(node)


def test_sizes_are_no_operations() -> None:
    one, _ = found()
    sizes = [node for node in one.graph.nodes if node.op == "call_function" and is_size(node)]
    assert sizes
    assert not any(map(is_operation, sizes))


def test_operations_are_named_as_aten_names_them() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    assert operation(graph.call_function(torch.ops.aten.linear.default, (x, x))) == "linear"
    assert operation(graph.call_function(min, (x,))) == "min"
