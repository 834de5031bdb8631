# SPDX-License-Identifier: Apache-2.0
"""Write complex arithmetic as real: a complex tensor becomes a real one with a last axis of two.

ONNX operators take no complex numbers, and some models turn pairs of channels by complex factors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ...core.errors import ExportError
from .names import module_path, source_of
from .rewrite import infer, insert, operations, replace
from .trace import Trace, value_of

__all__ = ["complex_as_real"]

ATEN = torch.ops.aten

ONE_AXIS = {
    "cat": 1,
    "select": 1,
    "slice": 1,
    "squeeze": 1,
    "stack": 1,
    "unbind": 1,
    "unsqueeze": 1,
    "split": 2,
    "split_with_sizes": 2,
}
"""Operation → position of its axis argument, which counts from the end where it is negative."""

AS_THEY_ARE = frozenset(
    {
        "alias",
        "clone",
        "contiguous",
        "detach",
        "getitem",
        "index",
        "index_select",
        "lift_fresh_copy",
    }
)

SAME_NUMBERS = frozenset(
    {"_to_copy", "resolve_conj", "resolve_neg", "to", "view_as_complex", "view_as_real"}
)

TO_REAL = frozenset({"imag", "real", "view_as_real"})


def complex_as_real(trace: Trace) -> None:
    """Rewrite every complex tensor of a traced graph.

    Raises:
        ExportError: an operation on complex numbers that is not known here.
    """
    pairs = {node for node in trace.graph.nodes if node.op != "output" and _is_complex(node)}
    for node in pairs:
        if node.op == "placeholder":
            _hold_pairs(trace, node)
    for node, name in operations(trace):
        if node not in pairs and pairs.isdisjoint(node.all_input_nodes):
            continue
        with trace.graph.inserting_before(node):
            new = _written_as_real(trace, node, name, pairs)
        if new is None:
            infer(trace, node)
        else:
            if name not in TO_REAL:
                pairs.add(new)
            replace(trace, node, new)


def _is_complex(node: fx.Node) -> bool:
    tensors = [t for t in pytree.tree_leaves(value_of(node)) if isinstance(t, Tensor)]
    return any(t.is_complex() for t in tensors)


def _hold_pairs(trace: Trace, node: fx.Node) -> None:
    """Let a complex constant be real; no checkpoint holds complex tensors."""
    if node in trace.weights:
        trace.constants[node] = trace.model.get_buffer(trace.weights.pop(node))
    values = trace.constants[node].resolve_conj()
    trace.constants[node] = torch.view_as_real(values).contiguous()
    with trace.mode:
        node.meta["val"] = torch.view_as_real(value_of(node))


def _written_as_real(trace: Trace, node: fx.Node, name: str, pairs: set[fx.Node]) -> fx.Node | None:
    """Return what stands for an operation, or None if it was changed in place."""
    args: Any = node.args

    def add(target: Any, *arguments: Any) -> fx.Node:
        return insert(trace, node, target, *arguments)

    def parts(x: fx.Node) -> tuple[fx.Node, fx.Node]:
        return add(ATEN.select.int, x, -1, 0), add(ATEN.select.int, x, -1, 1)

    if name in SAME_NUMBERS:  # the same numbers by another name, which says whether they are pairs
        return add(ATEN.alias.default, args[0])
    if name in ("real", "imag"):
        return parts(args[0])[name == "imag"]
    if name == "polar":
        cos, sin = (add(function, args[1]) for function in (ATEN.cos.default, ATEN.sin.default))
        scaled = [add(ATEN.mul.Tensor, args[0], x) for x in (cos, sin)]
        return add(ATEN.stack.default, scaled, -1)
    if name == "mul" and args[0] in pairs and args[1] in pairs:
        (a, b), (c, d) = parts(args[0]), parts(args[1])
        products = [add(ATEN.mul.Tensor, *pair) for pair in ((a, c), (b, d), (a, d), (b, c))]
        real = add(ATEN.sub.Tensor, products[0], products[1])
        imaginary = add(ATEN.add.Tensor, products[2], products[3])
        return add(ATEN.stack.default, [real, imaginary], -1)
    if name == "mul":
        pair, factor = args if args[0] in pairs else args[::-1]
        if isinstance(factor, fx.Node):
            factor = add(ATEN.unsqueeze.default, factor, -1)
        return add(ATEN.mul.Tensor, pair, factor)
    node.args = _real_arguments(trace, node, name)
    return None


def _real_arguments(trace: Trace, node: fx.Node, name: str) -> tuple[Any, ...]:
    """Return a layout operation's arguments with the last axis of two in mind."""
    args: Any = node.args
    if name in AS_THEY_ARE:
        return tuple(args)
    if name in ONE_AXIS:
        position = ONE_AXIS[name]
        given = args[position] if len(args) > position else 0
        return (*args[:position], _axis(given), *args[position + 1 :])
    if name in ("expand", "reshape"):
        return (args[0], [*args[1], 2])
    if name == "repeat":
        return (args[0], [*args[1], 1])
    if name == "transpose":
        return (args[0], _axis(args[1]), _axis(args[2]))
    if name == "permute":
        rank = len(args[1])
        return (args[0], [*(axis % rank for axis in args[1]), rank])
    if name == "gather":
        index = insert(trace, node, ATEN.unsqueeze.default, args[2], -1)
        size = [*[-1] * (value_of(index).ndim - 1), 2]
        return (args[0], _axis(args[1]), insert(trace, node, ATEN.expand.default, index, size))
    raise ExportError(
        f"module '{module_path(node)}' ({source_of(node)})",
        f"complex '{name}' can't be written as real",
        "report this with the model's config",
    )


def _axis(axis: int) -> int:
    return axis - 1 if axis < 0 else axis
