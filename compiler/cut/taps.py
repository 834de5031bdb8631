# SPDX-License-Identifier: Apache-2.0
"""Find in a block what policies look at: its modulated input, and what its attention adds."""

from __future__ import annotations

from typing import Any

from torch import fx

from ...core.errors import ExportError
from .names import module_path
from .words import PRODUCTS, operation, shape_of

__all__ = ["attention_output", "modulated_input"]


def modulated_input(module: fx.GraphModule, hidden: str) -> fx.Node:
    """Return what a block's first product of the stream multiplies: its normed, modulated input.

    Where a block joins it with a text first, it is the stream's part.

    Args:
        module: The block's graph.
        hidden: Argument that is the stream.

    Raises:
        ExportError: the block multiplies nothing of the stream's shape.
    """
    stream = _argument(module, hidden)
    seen = {stream}
    nodes: list[fx.Node] = list(module.graph.nodes)
    for node in nodes:
        if node.op != "call_function" or seen.isdisjoint(node.all_input_nodes):
            continue
        if operation(node) in PRODUCTS:
            for read in (part for n in node.all_input_nodes for part in _parts(n)):
                if read in seen and shape_of(read) == shape_of(stream):
                    return read
        seen.add(node)
    raise _missing(module, "no product reads the stream")


def _parts(node: fx.Node) -> list[fx.Node]:
    """Return a value and, if it joins two sequences, those."""
    return [node, *(node.all_input_nodes if operation(node) == "cat" else ())]


def attention_output(module: fx.GraphModule, hidden: str) -> fx.GraphModule:
    """Return a block's graph that also returns what its attention adds to the stream, gated.

    Args:
        module: The block's graph.
        hidden: Argument that is the stream.

    Raises:
        ExportError: nothing is added to the stream.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    result: Any = graph.graph_copy(module.graph, copies)
    found = _first_added(module, hidden)
    graph.output((*result, copies[found]))
    for node, copy in copies.items():
        copy.meta = dict(node.meta)
    return fx.GraphModule(module, graph, class_name=module._get_name())


def _first_added(module: fx.GraphModule, hidden: str) -> fx.Node:
    stream = _argument(module, hidden)
    for node in module.graph.nodes:
        if node.op != "call_function" or operation(node) != "add" or len(node.args) != 2:
            continue
        one, two = node.args
        if stream in (one, two):
            added: Any = two if one is stream else one
            if isinstance(added, fx.Node) and shape_of(added) == shape_of(stream):
                return added
    raise _missing(module, "nothing is added to the stream")


def _argument(module: fx.GraphModule, name: str) -> fx.Node:
    nodes: list[fx.Node] = list(module.graph.nodes)
    return next(n for n in nodes if n.op == "placeholder" and n.name == name)


def _missing(module: fx.GraphModule, what: str) -> ExportError:
    path = next((module_path(n) for n in module.graph.nodes if module_path(n)), "")
    return ExportError(
        f"block '{path}'", f"can't be tapped: {what}", "report this with the model's config"
    )
