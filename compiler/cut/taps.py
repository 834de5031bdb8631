# SPDX-License-Identifier: Apache-2.0
"""Find in a block what policies look at: its modulated input, and what its attention adds."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import fx

from ...core.errors import ExportError
from .names import module_path
from .trace import value_of
from .words import PRODUCTS, operation, shape_of

__all__ = ["attention_output", "modulated_input"]


def modulated_input(module: fx.GraphModule, hidden: str) -> fx.Node:
    """Return what a block's first product of the stream multiplies: its normed, modulated input.

    Where a block joins it with a text first, it is the stream's part, which is added to the graph;
    where a block lays it out anew first (by frames), it is the value as it was before.

    Args:
        module: The block's graph.
        hidden: Argument that is the stream.

    Raises:
        ExportError: the block multiplies nothing of the stream's shape.
    """
    stream = _argument(module.graph, hidden)
    seen = {stream}
    joints: list[fx.Node] = []
    nodes: list[fx.Node] = list(module.graph.nodes)
    for node in nodes:
        if node.op != "call_function" or seen.isdisjoint(node.all_input_nodes):
            continue
        if operation(node) in PRODUCTS:
            for read in (part for n in node.all_input_nodes for part in _parts(n)):
                if read in seen:
                    found = _of_stream(module.graph, read, stream, joints)
                    if found is not None:
                        return found
        seen.add(node)
        joints += [node] * _joins(node, stream)
    raise _missing(module.graph, "no product reads the stream")


LAYOUTS = frozenset(
    {"_unsafe_view", "clone", "permute", "reshape", "transpose", "unflatten", "view"}
)


def _parts(node: fx.Node) -> list[fx.Node]:
    """Return a value, what it lays out anew and, if it joins two sequences, those."""
    found = [node]
    while found[-1].op == "call_function" and operation(found[-1]) in LAYOUTS:
        found += found[-1].all_input_nodes[:1]
    last = found[-1]
    return [*found, *(last.all_input_nodes if operation(last) == "cat" else ())]


def _joins(node: fx.Node, stream: fx.Node) -> bool:
    """Say whether a value is the stream and other sequences, one behind another."""
    parts: Any = node.args[0] if node.args else None
    return operation(node) == "cat" and stream in parts


def _of_stream(
    graph: fx.Graph, value: fx.Node, stream: fx.Node, joints: Sequence[fx.Node]
) -> fx.Node | None:
    """Return a value of the stream's shape; of a joint sequence's shape, the stream's part of it.

    None of any other value.
    """
    if shape_of(value) == shape_of(stream):
        return value
    joint = next((one for one in joints if shape_of(one) == shape_of(value)), None)
    if joint is None:
        return None
    parts, axis = cast("tuple[list[fx.Node], int]", (*joint.args, 0)[:2])
    axis %= value_of(joint).ndim
    with graph.inserting_before(value.next):
        begin: Any = 0
        for part in parts[: parts.index(stream)]:
            begin = _sum(graph, begin, _extent(graph, part, axis))
        end = _sum(graph, begin, _extent(graph, stream, axis))
        found = graph.call_function(torch.ops.aten.slice.Tensor, (value, axis, begin, end))
    found.meta = {**value.meta, "val": value_of(stream)}
    return found


def attention_output(module: fx.GraphModule, hidden: str) -> fx.GraphModule:
    """Return a block's graph that also returns what its attention adds to the stream, gated.

    What is added first and not made of the stream (a position) is part of the stream.

    Args:
        module: The block's graph.
        hidden: Argument that is the stream, alone or joined with a text.

    Raises:
        ExportError: nothing is added to the stream.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    result: Any = graph.graph_copy(module.graph, copies)
    for node, copy in copies.items():
        copy.meta = dict(node.meta)
    graph.output((*result, _first_added(graph, hidden)))
    return fx.GraphModule(module, graph, class_name=module._get_name())


def _first_added(graph: fx.Graph, hidden: str) -> fx.Node:
    stream = _argument(graph, hidden)
    streams, seen = [stream], {stream}
    joints: list[fx.Node] = []
    for node in graph.nodes:
        if node.op != "call_function" or seen.isdisjoint(node.all_input_nodes):
            continue
        seen.add(node)
        if _joins(node, stream):
            streams.append(node)
            joints.append(node)
        if operation(node) != "add" or len(node.args) != 2:
            continue
        one, two = node.args
        if one in streams or two in streams:
            added: Any = two if one in streams else one
            if not isinstance(added, fx.Node):
                continue
            if added not in seen:
                streams.append(node)
                continue
            found = _of_stream(graph, added, stream, joints)
            if found is not None:
                return found
    raise _missing(graph, "nothing is added to the stream")


def _extent(graph: fx.Graph, node: fx.Node, axis: int) -> Any:
    """Return a tensor's size along an axis: a node where it is symbolic."""
    extent = value_of(node).shape[axis]
    if not isinstance(extent, torch.SymInt):
        return int(extent)
    found = graph.call_function(torch.ops.aten.sym_size.int, (node, axis))
    found.meta["val"] = extent
    return found


def _sum(graph: fx.Graph, one: Any, two: Any) -> Any:
    """Return the sum of two sizes."""
    if isinstance(one, int) and (one == 0 or isinstance(two, int)):
        return one + two if isinstance(two, int) else two
    found = graph.call_function(operator.add, (one, two))
    values = (size if isinstance(size, int) else value_of(size) for size in (one, two))
    found.meta["val"] = sum(values)
    return found


def _argument(graph: fx.Graph, name: str) -> fx.Node:
    nodes: list[fx.Node] = list(graph.nodes)
    return next(n for n in nodes if n.op == "placeholder" and n.name == name)


def _missing(graph: fx.Graph, what: str) -> ExportError:
    path = next((module_path(n) for n in graph.nodes if module_path(n)), "")
    return ExportError(
        f"block '{path}'", f"can't be tapped: {what}", "report this with the model's config"
    )
