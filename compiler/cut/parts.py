# SPDX-License-Identifier: Apache-2.0
"""Bring what divides a value, and puts it together again, to one form with few operations.

Sources unsqueeze each part of a modulation, take parts one index at a time, cut text from image
tokens only to join them again. A graph says each of these once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any, cast

import torch
from torch import fx

from .rewrite import infer, insert, operations, replace
from .trace import Trace, value_of
from .words import Instance, expression_of, operation, shape_of

__all__ = ["divide_once", "join_once"]

ATEN = torch.ops.aten

ELEMENTWISE = frozenset({"add", "mul", "sub"})

SPLITS = frozenset({"split", "split_with_sizes"})


def divide_once(trace: Trace) -> None:
    """Unsqueeze before a split, split in place of unbind, repeat no mask."""
    unsqueeze_before_splitting(trace)
    split_in_place_of_unbind(trace)
    repeat_no_mask(trace)


def join_once(trace: Trace, instances: Sequence[Instance]) -> None:
    """Join nothing that was whole, and permute a value once rather than each of its parts.

    Args:
        trace: Traced, its rotary embeddings found.
        instances: Its blocks. What one block divides and the next joins are two streams.
    """
    owner = {node: instance.block for instance in instances for node in instance.nodes}
    join_no_whole(trace, owner)
    turn_once(trace)
    trace.graph.eliminate_dead_code()


def unsqueeze_before_splitting(trace: Trace) -> None:
    """``[part.unsqueeze(d) for part in x.split(n)]`` becomes ``x.unsqueeze(d).split(n)``."""
    for node, name in operations(trace):
        if name not in SPLITS:
            continue
        source, size = cast("tuple[fx.Node, Any]", node.args[:2])
        readers = [user for part in node.users for user in part.users]
        rank = value_of(source).ndim
        axes = {cast("int", r.args[1]) % (rank + 1) for r in readers if _is(r, "unsqueeze")}
        if len(axes) != 1 or not all(_is(reader, "unsqueeze") for reader in readers):
            continue
        (axis,) = axes
        along = cast("int", node.args[2] if len(node.args) > 2 else 0) % rank
        with trace.graph.inserting_before(node):
            wide = insert(trace, node, ATEN.unsqueeze.default, source, axis)
        node.args = (wide, size, along + (along >= axis))
        infer(trace, node)
        for part in list(node.users):
            infer(trace, part)
            for reader in list(part.users):
                replace(trace, reader, part)


def split_in_place_of_unbind(trace: Trace) -> None:
    """``x.unbind(k)`` of (…, n, d, …) becomes a split of (…, n·d, …) into parts of d."""
    for node, name in operations(trace):
        if name != "unbind":
            continue
        source = cast("fx.Node", node.args[0])
        shape = value_of(source).shape
        axis = cast("int", node.args[1] if len(node.args) > 1 else 0) % len(shape)
        if axis + 1 == len(shape) or not all(isinstance(e, int) for e in shape[axis : axis + 2]):
            continue
        with trace.graph.inserting_before(node):
            flat = _flattened(trace, node, source, axis)
        if flat is None:
            continue
        node.target, node.args = ATEN.split.Tensor, (flat, int(shape[axis + 1]), axis)
        infer(trace, node)


def _flattened(trace: Trace, user: fx.Node, node: fx.Node, axis: int) -> fx.Node | None:
    """Return a value with two neighbouring dimensions in one; None where that needs two sizes."""
    shape = list(value_of(node).shape)
    flat = [*shape[:axis], shape[axis] * shape[axis + 1], *shape[axis + 2 :]]
    wanted = tuple(map(expression_of, flat))
    operands: Any = node.args[:2]
    if (
        operation(node) in ELEMENTWISE
        and list(node.users) == [user]
        and all(_has(o, shape, axis) for o in operands)
    ):
        behind = len(shape) - axis
        sides = [_flattened(trace, node, one, value_of(one).ndim - behind) for one in operands]
        if None not in sides:
            target: Any = node.target
            return insert(trace, node, target, *sides, **node.kwargs)
    while operation(node) in ("reshape", "unsqueeze"):
        node = cast("fx.Node", node.args[0])
        if shape_of(node) == wanted:
            return node
    spelled = [extent if isinstance(extent, int) else -1 for extent in flat]
    if spelled.count(-1) > 1:
        return None
    return insert(trace, user, ATEN.reshape.default, node, spelled)


def _has(operand: Any, shape: list[Any], axis: int) -> bool:
    """Say whether an operand has both of a sum's dimensions, rather than being spread over one."""
    if not isinstance(operand, fx.Node):
        return False
    own = value_of(operand).shape
    place = len(own) - (len(shape) - axis)
    return place >= 0 and list(own[place : place + 2]) == shape[axis : axis + 2]


def join_no_whole(trace: Trace, owner: Mapping[fx.Node, str]) -> None:
    """A concatenation of all parts of a value, in their order, is the value."""
    for node, name in operations(trace):
        if name != "cat":
            continue
        parts = cast("list[fx.Node]", node.args[0])
        axis = cast("int", node.args[1] if len(node.args) > 1 else 0) % value_of(node).ndim
        whole = _of_two_slices(parts, axis) or _of_a_split(parts, axis)
        if whole is not None and owner.get(whole) == owner.get(node):
            replace(trace, node, whole)
            for part in parts:
                _measure_another(trace, part)


def _measure_another(trace: Trace, part: fx.Node) -> None:
    """Take sizes from an earlier value where nothing but the shape of this one is read."""
    if not part.users or not all(_is(user, "sym_size") for user in part.users):
        return
    before = [n for n in takewhile(lambda n: n is not part, trace.graph.nodes) if shape_of(n)]
    for size in list(part.users):
        extent = expression_of(value_of(size))
        other = next((n for n in before if extent in shape_of(n)), None)
        if other is not None:
            size.args = (other, shape_of(other).index(extent))


def _of_two_slices(parts: list[fx.Node], axis: int) -> fx.Node | None:
    """Return what ``x[:m]`` and ``x[m:]`` are slices of."""
    if len(parts) != 2 or not all(_is(part, "slice") for part in parts):
        return None
    (source, *_), (other, *_) = (part.args for part in parts)
    one, two = (_bounds(part) for part in parts)
    is_whole = one[1] in (None, 0) and two[2] is None and _same(one[2], two[1])
    if source is not other or not is_whole or {one[0], two[0]} != {axis}:
        return None
    return cast("fx.Node", source)


def _bounds(part: fx.Node) -> tuple[int, Any, Any]:
    """Return a slice's axis, first index and last; None where it has no end, or skips some."""
    given: tuple[Any, ...] = (*part.args, *(0, None, None, 1)[len(part.args) - 1 :])
    source, axis, start, end, step = given
    value = value_of(source)
    axis %= value.ndim
    if isinstance(end, int) and (end >= 2**62 or end == value.shape[axis]):
        end = None
    return (axis, start, end) if step == 1 else (-1, None, None)


def _same(one: Any, two: Any) -> bool:
    if isinstance(one, fx.Node) and isinstance(two, fx.Node):
        return one is two or bool(expression_of(value_of(one)) == expression_of(value_of(two)))
    return one is not None and one == two


def _of_a_split(parts: list[fx.Node], axis: int) -> fx.Node | None:
    """Return what all of a split's parts are parts of."""
    if not all(_is(part, "getitem") for part in parts):
        return None
    splits = {part.args[0] for part in parts}
    split: Any = splits.pop()
    if splits or operation(split) not in SPLITS:
        return None
    along = (split.args[2] if len(split.args) > 2 else 0) % value_of(split.args[0]).ndim
    in_order = [part.args[1] for part in parts] == list(range(len(value_of(split))))
    return cast("fx.Node", split.args[0]) if in_order and along == axis else None


def repeat_no_mask(trace: Trace) -> None:
    """Attention spreads a mask over its heads by itself: none is repeated for each."""
    for node, name in operations(trace):
        mask: Any = node.args[3] if name == "scaled_dot_product_attention" and node.args[3:] else 0
        if not isinstance(mask, fx.Node) or operation(mask) != "reshape":
            continue
        repeated: Any = mask.args[0]
        if operation(repeated) != "repeat_interleave" or repeated.args[2:] != (0,):
            continue
        source, heads = repeated.args[:2]
        asked: Any = mask.args[1]
        own = shape_of(source)[1:]
        has_axis = len(own) == 3 and own[0] == 1
        if asked[1] != heads or shape_of(mask)[2:] != own[has_axis:]:
            continue
        spread = source
        if not has_axis:
            with trace.graph.inserting_before(node):
                spread = insert(trace, mask, ATEN.unsqueeze.default, source, 1)
        node.args = (*node.args[:3], spread, *node.args[4:])


def turn_once(trace: Trace) -> None:
    """Permute a value once, rather than each of its parts there and back."""
    for node, name in operations(trace):
        if name == "permute":
            _turn_what_is_joined(trace, node)
    for node, name in operations(trace):
        if name == "permute" and _is_one_of_several_slices(node):
            _turn_before_slicing(trace, node)


def _turn_what_is_joined(trace: Trace, node: fx.Node) -> None:
    """``cat([a.permute(p), b]).permute(q)``, p undone by q, becomes ``cat([a, b.permute(q)])``."""
    joined, order = cast("tuple[fx.Node, list[int]]", node.args)
    if operation(joined) != "cat" or list(joined.users) != [node]:
        return
    parts = cast("list[fx.Node]", joined.args[0])
    axis = cast("int", joined.args[1] if len(joined.args) > 1 else 0) % len(order)
    if not any(_undoes(order, part) for part in parts):
        return
    with trace.graph.inserting_before(node):
        turned = [
            part.args[0]
            if _undoes(order, part)
            else insert(trace, part, ATEN.permute.default, part, order)
            for part in parts
        ]
        new = insert(trace, joined, ATEN.cat.default, turned, order.index(axis))
    replace(trace, node, new)


def _undoes(order: list[int], part: fx.Node) -> bool:
    """Say whether a part is a permutation that this one brings back."""
    if operation(part) != "permute":
        return False
    before = cast("list[int]", part.args[1])
    return [before[i] for i in order] == list(range(len(order)))


def _is_one_of_several_slices(node: fx.Node) -> bool:
    """Say whether a permutation turns one of several slices of a value, all of them alike."""
    if operation(cast("fx.Node", node.args[0])) != "slice":
        return False
    sliced = cast("fx.Node", node.args[0])
    readers = list(cast("fx.Node", sliced.args[0]).users)
    turned = [u for s in readers if operation(s) == "slice" for u in s.users if _is(u, "permute")]
    turned += [u for u in readers if _is(u, "permute")]
    return len(turned) > 1 and all(u.args[1] == node.args[1] for u in turned)


def _turn_before_slicing(trace: Trace, node: fx.Node) -> None:
    """``x[:, m:].permute(q)`` becomes a slice of ``x.permute(q)``, which its other slices read too."""
    sliced, order = cast("tuple[fx.Node, list[int]]", node.args)
    source, axis = cast("tuple[fx.Node, int]", sliced.args[:2])
    turned = next((u for u in source.users if _is(u, "permute") and u.args[1] == order), None)
    if turned is None:
        with trace.graph.inserting_after(source):
            turned = insert(trace, source, ATEN.permute.default, source, order)
    with trace.graph.inserting_before(node):
        new = insert(
            trace,
            sliced,
            ATEN.slice.Tensor,
            turned,
            order.index(axis % len(order)),
            *sliced.args[2:],
        )
    replace(trace, node, new)


def _is(node: fx.Node, name: str) -> bool:
    return node.op == "call_function" and operation(node) == name
