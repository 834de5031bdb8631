# SPDX-License-Identifier: Apache-2.0
"""Carry a sequence of text and latents from block to block as its two parts.

Many models join both sequences before their last blocks (`cat([text, hidden])`) and take the latents'
part of it behind them. The stream whose residual is cached is the latents' alone: each block joins the
parts itself and divides its result again, as FLUX.1's own blocks do.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any, cast

import sympy
import torch
from torch import Tensor, fx

from .classes import Dependency, classify
from .lone import take_out_lists_of_one
from .rewrite import insert, operations, replace
from .trace import Trace, value_of
from .words import Instance, expression_of, is_size, operation, shape_of

__all__ = ["divide_joint"]

ATEN = torch.ops.aten

ROW_WISE = frozenset(
    {"add", "div", "gelu", "layer_norm", "linear", "mul", "rms_norm", "sigmoid", "silu", "sub", "tanh"}
)  # fmt: skip
"""Operations that compute each token for itself; the last axis is the channels'."""

Part = tuple[int, Any, Any]
"""Axis, and the expressions at which a part of a tensor begins and ends."""


def divide_joint(trace: Trace, instances: Sequence[Instance]) -> None:
    """Let blocks that hand on a joint sequence hand on its parts."""
    inside = {node for i in instances for node in i.nodes}
    join_with_every_axis(trace, inside)
    of = classify(trace).of
    for node, name in operations(trace):
        if name == "cat" and node not in inside and _is_of_text_and_latents(node, of):
            _follow(trace, node, instances)
    take_parts(trace, inside, fixed={node for node in of if "step" not in of[node].on})
    trace.graph.eliminate_dead_code()


def _is_of_text_and_latents(cat: fx.Node, of: Mapping[fx.Node, Dependency]) -> bool:
    """Say whether tokens are of the latents and of the prompt: learnt ones stay with the latents."""
    parts = cast("list[fx.Node]", cat.args[0])
    is_of_tokens = _axis(cat) < value_of(cat).ndim - 1
    of_both = "step" in of[cat].on and all(of[part].on & {"prompt", "step"} for part in parts)
    return is_of_tokens and of_both


def join_with_every_axis(trace: Trace, inside: set[fx.Node]) -> None:
    """Outside blocks, parts that are joined and then get an axis get it before they are joined."""
    for node, name in operations(trace):
        joint: Any = node.args[0] if name == "unsqueeze" else None
        if joint is None or node in inside or not _is_cat(joint) or len(joint.users) > 1:
            continue
        below = _axis(joint)
        new: Any = node.args[1]
        new %= value_of(node).ndim
        with trace.graph.inserting_before(node):
            parts = [
                insert(trace, node, ATEN.unsqueeze.default, part, new)
                for part in cast("list[fx.Node]", joint.args[0])
            ]
            wide = insert(trace, joint, ATEN.cat.default, parts, below + (new <= below))
        replace(trace, node, wide)
        trace.graph.erase_node(joint)
    take_out_lists_of_one(trace)


def _follow(trace: Trace, joint: fx.Node, instances: Sequence[Instance]) -> None:
    """Let each block that takes a joint sequence, and hands one on, join and divide it itself."""
    axis = _axis(joint)
    for instance in instances:
        readers = [n for n in instance.nodes if joint in n.all_input_nodes]
        made = _handed_on(joint, instance)
        if not readers or made is None:
            continue
        parts: Any = joint.args[0]
        with trace.graph.inserting_before(readers[0]):
            inner = insert(trace, readers[0], ATEN.cat.default, list(parts), axis)
        for reader in readers:
            reader.replace_input_with(joint, inner)
        outside = _readers_outside(made, instance)
        with trace.graph.inserting_before(_after(instance.nodes[-1])):
            divided = _divide(trace, made, parts, axis)
            joint = insert(trace, made, ATEN.cat.default, divided, axis)
        joint.meta.pop("nn_module_stack", None)  # it belongs to no block
        _keep_alive(trace, divided)
        for reader in outside:
            reader.replace_input_with(made, joint)


def _handed_on(joint: fx.Node, instance: Instance) -> fx.Node | None:
    """Return what a block makes of a joint sequence's shape for others to read, if it is one value."""
    found = [
        node
        for node in instance.nodes
        if shape_of(node) == shape_of(joint) and _readers_outside(node, instance)
    ]
    return found[0] if len(found) == 1 else None


def _readers_outside(node: fx.Node, instance: Instance) -> list[fx.Node]:
    """Return what reads a block's value outside of it; what looks at its shape does not."""
    others = [user for user in node.users if user not in instance.index]
    return [user for user in others if user.op != "output" and not is_size(user)]


def _divide(trace: Trace, made: fx.Node, parts: Sequence[fx.Node], axis: int) -> list[fx.Node]:
    """Return slices of a block's result as long as the parts of what it took."""
    begin: Any = 0
    found = []
    for part in parts:
        size: Any = value_of(part).shape[axis]
        if isinstance(size, torch.SymInt):
            size = insert(trace, made, ATEN.sym_size.int, part, axis)
        if begin == 0:
            end = size
        elif isinstance(begin, int) and isinstance(size, int):
            end = begin + size
        else:
            end = insert(trace, made, operator.add, begin, size)
        found.append(insert(trace, made, ATEN.slice.Tensor, made, axis, begin, end))
        begin = end
    return found


def _keep_alive(trace: Trace, nodes: Sequence[fx.Node]) -> None:
    """Keep what nobody may read: the last block divides its result as the others do."""
    (output,) = trace.graph.find_nodes(op="output")
    returned: Any = output.args[0]
    output.args = ((*returned, *nodes),)


def _after(node: fx.Node) -> fx.Node:
    following: fx.Node = node.next
    return following


def _is_cat(node: fx.Node) -> bool:
    return node.op == "call_function" and operation(node) == "cat"


def _axis(cat: fx.Node) -> int:
    axis: Any = cat.args[1] if len(cat.args) > 1 else 0
    found: int = axis % value_of(cat).ndim
    return found


def take_parts(trace: Trace, inside: set[fx.Node], fixed: set[fx.Node]) -> None:
    """Outside blocks, a slice of what was joined becomes the part that it is.

    What is computed between the two, token by token, is computed of the part. A block takes parts of
    what is no stream, and is itself the concatenation.
    """
    for node, name in operations(trace):
        source: Any = node.args[0] if name == "slice" else None
        if source is None or (node in inside and not (source in fixed and _is_cat(source))):
            continue
        wanted = _wanted(node)
        if wanted is None or not _is_joined(source, wanted, inside):
            continue
        with trace.graph.inserting_before(node):
            new = _taken(trace, source, wanted, node)
        replace(trace, node, new)


def _wanted(node: fx.Node) -> Part | None:
    """Return which part a slice takes; None of every second element."""
    given = (*node.args, *(None, 0, None, None, 1)[len(node.args) :])
    source, axis, begin, _, step = cast("tuple[Any, ...]", given)
    if step != 1:
        return None
    if isinstance(begin, fx.Node):
        begin = value_of(begin)
    begin = expression_of(begin or 0)
    if begin.is_negative if isinstance(begin, sympy.Basic) else begin < 0:
        begin = expression_of(value_of(source).shape[axis]) + begin
    return (
        axis % value_of(source).ndim,
        begin,
        begin + expression_of(value_of(node).shape[axis]),
    )


def _is_joined(node: fx.Node, part: Part, inside: set[fx.Node]) -> bool:
    """Say whether a part of a value can be had without computing all of it."""
    axis, begin, end = part
    if node.op != "call_function" or node in inside:
        return False
    if operation(node) == "cat":
        return _axis(node) == axis and _piece(node, begin, end) is not None
    if operation(node) == "permute":
        order = cast("list[int]", node.args[1])
        return _is_joined(node.all_input_nodes[0], (order[axis], begin, end), inside)
    if operation(node) in ("squeeze", "unsqueeze"):
        return _axis_below(node, axis) >= 0 and _is_joined(
            node.all_input_nodes[0], (_axis_below(node, axis), begin, end), inside
        )
    if operation(node) not in ROW_WISE or axis >= value_of(node).ndim - 1:
        return False
    return all(
        _is_joined(n, (axis - value_of(node).ndim + value_of(n).ndim, begin, end), inside)
        for n in node.all_input_nodes
        if _is_long(n, node, axis)
    )


def _axis_below(node: fx.Node, axis: int) -> int:
    """Return which axis of its source an axis of a `squeeze`'s or `unsqueeze`'s result is.

    −1 for a new one, and where it is not said which axis goes.
    """
    changed: Any = node.args[1] if len(node.args) > 1 else None
    if not isinstance(changed, int):
        return -1
    if operation(node) == "squeeze":
        wide: int = value_of(node.all_input_nodes[0]).ndim
        return axis + (changed % wide <= axis)
    changed %= int(value_of(node).ndim)
    return -1 if changed == axis else axis - (changed < axis)


def _is_long(read: fx.Node, node: fx.Node, axis: int) -> bool:
    """Say whether an argument has as many elements along an axis as a result has."""
    value, result = value_of(read), value_of(node)
    if not isinstance(value, Tensor):
        return False
    behind = result.ndim - axis  # shapes are aligned at their last axis
    return value.ndim >= behind and str(value.shape[-behind]) == str(result.shape[axis])


def _piece(cat: fx.Node, begin: Any, end: Any) -> tuple[fx.Node, bool] | None:
    """Return the operand of a `cat` between two expressions, and whether they take all of it.

    Of the first operand also a part, as a padded sequence has one.
    """
    place: Any = 0
    parts: Any = cat.args[0]
    for part in parts:
        size = expression_of(value_of(part).shape[_axis(cat)])
        if place == begin and place + size == end:
            return part, True
        if place == 0 and begin == 0 and sympy.sympify(size - end).is_nonnegative:
            return part, False
        place = place + size
    return None


def _taken(trace: Trace, node: fx.Node, part: Part, slice_: fx.Node) -> fx.Node:
    """Return the part of a value that a slice takes, and that `_is_joined`."""
    axis, begin, end = part
    if operation(node) == "cat":
        found = _piece(node, begin, end)
        assert found is not None, "who takes a part has asked for it"
        piece, is_whole = found
        if is_whole:
            return piece
        return insert(trace, slice_, ATEN.slice.Tensor, piece, axis, 0, slice_.args[3])

    def argument(read: fx.Node) -> fx.Node:
        if operation(node) == "permute":
            order = cast("list[int]", node.args[1])
            return _taken(trace, read, (order[axis], begin, end), slice_)
        if operation(node) in ("squeeze", "unsqueeze"):
            return _taken(trace, read, (_axis_below(node, axis), begin, end), slice_)
        place = axis - value_of(node).ndim + getattr(value_of(read), "ndim", 0)
        is_long = _is_long(read, node, axis)
        return _taken(trace, read, (place, begin, end), slice_) if is_long else read

    args, kwargs = fx.map_arg((node.args, node.kwargs), argument)
    return insert(trace, node, node.target, *args, **kwargs)
