# SPDX-License-Identifier: Apache-2.0
"""Copy nodes of a traced graph into a graph of their own, which is a segment's."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import fx, nn

from ...core.errors import ExportError
from .classes import Classes
from .names import fresh_name, module_path, source_of, value_name
from .sizes import SizeMaker, shape_donors
from .trace import Trace, value_of
from .words import is_operation, operation, shape_of, sizes_read, tensors_read

__all__ = ["extract", "hold"]

KEPT_META = ("val", "nn_module_stack", "stack_trace")

JOINS = frozenset({"cat", "stack"})
"""Operations that spread none of their arguments over the batch."""


def extract(
    trace: Trace,
    classes: Classes,
    nodes: Sequence[fx.Node],
    outputs: Sequence[fx.Node],
    *,
    name: str,
    block: str = "",
) -> tuple[fx.GraphModule, list[fx.Node]]:
    """Copy nodes into a graph of their own, with the constants that they read.

    Args:
        trace: The traced graph.
        classes: Dependencies of its nodes.
        nodes: What to copy, in order.
        outputs: Those among them that the graph returns.
        name: The segment's.
        block: The graph's own weights are those below it, named without it; outside blocks, all.

    Returns:
        The graph, and what it reads: nodes of the traced graph in the order of its arguments.

    Raises:
        ExportError: no input has a size that a node needs.
    """
    nodes = _with_constants(trace, classes, nodes)
    read = dict.fromkeys(n for node in nodes for n in tensors_read(node))
    prefix = f"{block}." if block else ""
    weights = {
        n: trace.weights[n].removeprefix(prefix)
        for n in read
        if n in trace.weights and trace.weights[n].startswith(prefix)
    }
    constants = [n for n in read if n in trace.constants]
    inputs = [n for n in read if n not in {*nodes, *weights, *constants}]
    inputs += _donors(trace, nodes, inputs, name)

    root, graph = nn.Module(), fx.Graph()
    new: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        taken = {str(n.target) for n in new.values()}  # `input` is a name that fx spells `input_1`
        new[node] = graph.placeholder(_argument(trace, node, taken))
    # A table comes in as one row for the whole batch: its length is no batch's size, and the batch's
    # is no table's.
    tables = {n: p for n, p in new.items() if classes.runs(n) == "run"}
    others = {n: p for n, p in new.items() if n not in tables}
    sizes = {
        True: SizeMaker(graph, {**tables, **others}),
        False: SizeMaker(graph, {**others, **tables}),
    }
    for node, path in weights.items():
        weight = torch.empty(value_of(node).shape, device="meta")
        hold(root, path, nn.Parameter(weight, requires_grad=False))
        new[node] = graph.get_attr(path)
    for i, node in enumerate(constants):
        root.register_buffer(f"constant_{i}", trace.constants[node], persistent=False)
        new[node] = graph.get_attr(f"constant_{i}")

    rows = {node for node in new if classes.runs(node) == "run"}
    for node in nodes:
        is_table = classes.runs(node) == "run"
        if is_table or _is_of_rows(node, rows):
            rows.add(node)
        joins = operation(node) in JOINS and not is_table

        def argument(read: fx.Node, size: SizeMaker = sizes[is_table], joins: bool = joins) -> Any:
            if read not in new:
                return size(value_of(read).node.expr)
            return _spread(graph, read, new[read], size) if joins and read in rows else new[read]

        target: Any = node.target
        new[node] = graph.call_function(
            target, fx.map_arg(node.args, argument), fx.map_arg(node.kwargs, argument)
        )
    for node, copy in new.items():
        copy.meta = {key: node.meta[key] for key in KEPT_META if key in node.meta}
        copy.meta["dependency"] = classes.of.get(node)
    graph.output(tuple(new[node] for node in outputs))
    graph.eliminate_dead_code()
    return fx.GraphModule(root, graph, class_name=name), inputs


def _is_of_rows(node: fx.Node, rows: Collection[fx.Node]) -> bool:
    """Say whether a value is made of tables' rows alone, and one for the whole batch as they are."""
    read = tensors_read(node)
    return bool(read) and all(n in rows and shape_of(n)[:1] == shape_of(node)[:1] for n in read)


def _spread(graph: fx.Graph, row: fx.Node, copy: fx.Node, size: SizeMaker) -> fx.Node:
    """Repeat a table's row, or what is made of it, for each element of the batch that it is joined with."""
    batch, *others = shape_of(row)
    spread = graph.call_function(
        torch.ops.aten.expand.default, (copy, [size(batch), *[-1] * len(others)])
    )
    spread.meta = {key: row.meta[key] for key in KEPT_META if key in row.meta}
    return spread


def _with_constants(trace: Trace, classes: Classes, nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """Return nodes and what they read that depends on nothing, in the graph's order."""
    found = set(nodes)
    waiting = list(nodes)
    while waiting:
        for node in tensors_read(waiting.pop()):
            if is_operation(node) and node not in found and classes.runs(node) == "constant":
                found.add(node)
                waiting.append(node)
    return [node for node in trace.graph.nodes if node in found]


def _donors(
    trace: Trace, nodes: Sequence[fx.Node], inputs: list[fx.Node], name: str
) -> list[fx.Node]:
    try:
        return shape_donors([e for n in nodes for e in sizes_read(n)], inputs, trace.inputs)
    except LookupError as error:
        raise ExportError(
            f"segment '{name}', module '{module_path(nodes[0])}' ({source_of(nodes[0])})",
            f"needs the size '{error}', which no input has",
            "report this with the model's config",
        ) from error


def _argument(trace: Trace, node: fx.Node, taken: Collection[str]) -> str:
    """Return what a graph calls something that it reads."""
    given = trace.inputs.get(node) or trace.weights.get(node)
    return fresh_name(given.replace(".", "_") if given else value_name(node), taken)


def hold(root: nn.Module, path: str, value: torch.Tensor) -> None:
    """Register a weight, or a constant, under a dotted path."""
    *parents, name = path.split(".")
    for parent in parents:
        if parent not in root._modules:
            root.add_module(parent, nn.Module())
        root = root.get_submodule(parent)
    if isinstance(value, nn.Parameter):
        root.register_parameter(name, value)
    else:
        root.register_buffer(name, value, persistent=False)
