# SPDX-License-Identifier: Apache-2.0
"""Copy part of a segment's graph into a graph of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import fx, nn

from ..cut.extract import hold

__all__ = ["copied"]


def copied(
    source: fx.GraphModule,
    nodes: Sequence[fx.Node],
    given: Mapping[str, fx.Node],
    returned: Mapping[str, fx.Node],
    name: str,
    *,
    turned: Sequence[str] = (),
    measured: Mapping[fx.Node, str] = MappingProxyType({}),
) -> fx.GraphModule:
    """Copy nodes of a graph, with the weights and constants that they read.

    Args:
        source: The graph.
        nodes: What to copy, in the graph's order; arguments and weights excluded.
        given: What the copy calls each value that it is given → that value.
        returned: What it calls what it returns → that value.
        name: The copy's.
        turned: Of those given and returned, by their names: four dimensions, of which the copy's
            callers have the first two the other way round.
        measured: Value of which sizes alone are read → what is given and has them too.
    """
    root, graph = nn.Module(), fx.Graph()
    new: dict[fx.Node, fx.Node] = {}
    for argument, node in given.items():
        new[node] = graph.placeholder(argument)
    new |= {node: new[given[argument]] for node, argument in measured.items()}
    for argument in (a for a in given if a in turned):
        new[given[argument]] = _turned(graph, new[given[argument]])

    def read(node: fx.Node) -> fx.Node:
        if node not in new:
            assert node.op == "get_attr", f"'{node.name}' is given by nothing"
            path = str(node.target)
            hold(root, path, _held(source, path))
            new[node] = graph.get_attr(path)
        return new[node]

    for node in nodes:
        new[node] = graph.node_copy(node, read)
    results = {n: read(node) for n, node in returned.items()}
    graph.output(tuple(_turned(graph, r) if n in turned else r for n, r in results.items()))
    module = fx.GraphModule(root, graph, class_name=name)
    # What no checkpoint holds is no part of a state dict; a graph module forgets that.
    module._non_persistent_buffers_set.update(n for n, _ in module.named_buffers())
    return module


def _turned(graph: fx.Graph, node: fx.Node) -> fx.Node:
    return graph.call_function(torch.ops.aten.permute.default, (node, [1, 0, 2, 3]))


def _held(source: fx.GraphModule, path: str) -> Any:
    owner, _, name = path.rpartition(".")
    return getattr(source.get_submodule(owner), name)
