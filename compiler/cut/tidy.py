# SPDX-License-Identifier: Apache-2.0
"""Tidy a traced graph before anything is looked for in it.

Each function brings one kind of spelling to one form; none changes what the graph computes.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, fx

from .complex_as_real import complex_as_real
from .lone import take_out_lists_of_one
from .parts import divide_once
from .rewrite import insert, operations, replace
from .trace import Trace, value_of
from .words import operation

__all__ = ["same", "size_nodes", "tidy"]

ATEN = torch.ops.aten

ASSERTIONS = frozenset(
    {"_assert_async", "_assert_scalar", "_assert_tensor_metadata", "sym_constrain_range_for_size"}
)

FILLS = {
    "empty_like": 0,
    "new_empty": 0,
    "zeros_like": 0,
    "new_zeros": 0,
    "ones_like": 1,
    "new_ones": 1,
    "full_like": None,
    "new_full": None,
}
"""Operations that look at a tensor's shape alone, and the number they fill with."""

NO_OPS = frozenset(  # where they change neither shape nor dtype
    {
        "_to_copy", "alias", "clone", "contiguous", "detach", "dropout", "expand", "lift_fresh_copy",
        "reshape", "slice", "squeeze", "to", "type_as", "view", "view_as",
    }
)  # fmt: skip

VIEWS = frozenset({"view", "reshape", "_unsafe_view"})


def tidy(trace: Trace) -> None:
    """Bring a traced graph to one form."""
    drop_assertions(trace)
    take_no_tensor_for_its_shape(trace)
    spell_views(trace)
    spell_by_one_name(trace)
    fill_masks_by_logic(trace)
    index_by_int64(trace)
    repeat_shared_heads(trace)
    take_out_lists_of_one(trace)
    complex_as_real(trace)
    drop_no_ops(trace)
    divide_once(trace)
    stack_what_is_written_in_turn(trace)
    compose_rms_norms(trace)
    trace.graph.eliminate_dead_code()


def drop_assertions(trace: Trace) -> None:
    """Assumptions are in `Trace.domain`."""
    for node in list(trace.graph.nodes):
        if node.op == "call_function" and operation(node) in ASSERTIONS:
            trace.graph.erase_node(node)


def take_no_tensor_for_its_shape(trace: Trace) -> None:
    """`zeros_like(x)` becomes `full(sizes, 0)`: it depends on sizes, not on x."""
    for node, name in operations(trace):
        if name not in FILLS:
            continue
        source: Any = node.args[0]
        fill: Any = FILLS[name]
        if fill is None:
            fill = node.args[1 if name == "full_like" else 2]
        with trace.graph.inserting_before(node):
            size = node.args[1] if name.startswith("new_") else size_nodes(trace, source)
            dtype = value_of(node).dtype
            new = insert(trace, node, ATEN.full.default, size, fill, dtype=dtype)
        replace(trace, node, new)


def size_nodes(trace: Trace, source: fx.Node) -> list[fx.Node | int]:
    """Return a tensor's shape: numbers, and nodes where it is symbolic."""
    return [
        insert(trace, source, ATEN.sym_size.int, source, axis)
        if isinstance(extent, torch.SymInt)
        else int(extent)
        for axis, extent in enumerate(value_of(source).shape)
    ]


def drop_no_ops(trace: Trace) -> None:
    """Drop casts to the same dtype, views of the same shape, copies, dropout."""
    for node, name in operations(trace):
        source = node.args[0] if node.args else None
        if name in NO_OPS and isinstance(source, fx.Node) and same(node, source):
            replace(trace, node, source)


def same(node: fx.Node, other: fx.Node) -> bool:
    """Say whether two nodes' tensors have one shape and dtype."""
    one, two = value_of(node), value_of(other)
    return (
        isinstance(one, Tensor)
        and isinstance(two, Tensor)
        and one.dtype == two.dtype
        and [str(e) for e in one.shape] == [str(e) for e in two.shape]
    )


def spell_views(trace: Trace) -> None:
    """Views become `reshape`, which takes any strides, with −1 only where the size is symbolic.

    A batch that stays is the source's own: TensorRT bounds what it has to infer by the largest of all
    else over the smallest of the sizes beside it.
    """
    for node, name in operations(trace):
        if name in VIEWS:
            source, shape = cast("tuple[fx.Node, list[Any]]", node.args)
            spelled = [
                int(extent) if asked == -1 and not isinstance(extent, torch.SymInt) else asked
                for asked, extent in zip(shape, value_of(node).shape, strict=True)
            ]
            if spelled[:1] == [-1] and _keeps_batch(node, source):
                with trace.graph.inserting_before(node):
                    spelled[0] = insert(trace, source, ATEN.sym_size.int, source, 0)
            node.target, node.args = ATEN.reshape.default, (source, spelled)


def _keeps_batch(node: fx.Node, source: fx.Node) -> bool:
    """Say whether a view has its source's first size."""
    return str(value_of(node).shape[0]) == str(value_of(source).shape[0])


def spell_by_one_name(trace: Trace) -> None:
    """`transpose` becomes `permute`, `concat` becomes `cat`."""
    for node, name in operations(trace):
        if name in ("concat", "concatenate"):
            node.target = ATEN.cat.default
        if name == "transpose":
            source, *axes = cast("tuple[fx.Node, int, int]", node.args)
            order = list(range(value_of(source).ndim))
            one, two = (axis % len(order) for axis in axes)
            order[one], order[two] = order[two], order[one]
            node.target, node.args = ATEN.permute.default, (source, order)


def fill_masks_by_logic(trace: Trace) -> None:
    """A truth value filled in where a mask says so is `or` (true) or `and not` (false).

    ONNX Runtime has no `Where` of truth values.
    """
    for node, name in operations(trace):
        if name == "masked_fill" and value_of(node).dtype is torch.bool:
            source, mask, filled = node.args
            if isinstance(filled, fx.Node):
                continue  # its value is not known
            with trace.graph.inserting_before(node):
                if filled:
                    new = insert(trace, node, ATEN.logical_or.default, source, mask)
                else:
                    kept = insert(trace, node, ATEN.logical_not.default, mask)
                    new = insert(trace, node, ATEN.logical_and.default, source, kept)
            replace(trace, node, new)


def index_by_int64(trace: Trace) -> None:
    """Indices are int64: ONNX looks nothing up by int32 in several dimensions."""
    for node, name in operations(trace):
        indices: Any = node.args[1] if name == "index" else ()
        for index in indices:
            if index is not None and value_of(index).dtype is torch.int32:
                with trace.graph.inserting_before(node):
                    wide = insert(trace, index, ATEN._to_copy.default, index, dtype=torch.int64)
                node.replace_input_with(index, wide)


def repeat_shared_heads(trace: Trace) -> None:
    """Keys and values that several query heads share are repeated for each.

    ONNX Runtime's attention takes as many of one as of the other.
    """
    for node, name in operations(trace):
        if name != "scaled_dot_product_attention" or not node.kwargs.get("enable_gqa"):
            continue
        heads = int(value_of(node.args[0]).shape[1])  # type: ignore[arg-type]  # a node
        with trace.graph.inserting_before(node):
            for place in (1, 2):
                shared: Any = node.args[place]
                times = heads // int(value_of(shared).shape[1])
                parts = [insert(trace, shared, ATEN.unsqueeze.default, shared, 2)] * times
                joined = insert(trace, shared, ATEN.cat.default, parts, 2)
                repeated = insert(trace, shared, ATEN.flatten.using_ints, joined, 1, 2)
                node.update_arg(place, repeated)
        node.kwargs = {k: v for k, v in node.kwargs.items() if k != "enable_gqa"}


def stack_what_is_written_in_turn(trace: Trace) -> None:
    """`y[..., 0::2] = even; y[..., 1::2] = odd` becomes one stack of both."""
    for node, name in operations(trace):
        inner: Any = node.args[0] if name == "slice_scatter" else None
        if inner is None or operation(inner) != "slice_scatter":
            continue
        filled: Any = inner.args[0]
        if operation(filled) != "full":
            continue
        rank = value_of(node).ndim
        written = [_written(one, rank) for one in (inner, node)]
        even, odd = (copy.args[1] if operation(copy) == "copy" else copy for copy, _ in written)
        if [start for _, start in written] != [0, 1] or not same(even, odd):
            continue
        with trace.graph.inserting_before(node):
            stacked = insert(trace, node, ATEN.stack.default, [even, odd], -1)
            new = insert(trace, node, ATEN.reshape.default, stacked, filled.args[0])
        replace(trace, node, new)


def _written(scatter: fx.Node, rank: int) -> tuple[Any, int | None]:
    """Return what is written into every second channel, and from which on; None if otherwise."""
    _, source, axis, start, end, step = cast("tuple[Any, ...]", scatter.args)
    every_second = axis % rank == rank - 1 and end >= value_of(scatter).shape[-1] and step == 2
    return source, start if every_second else None


def compose_rms_norms(trace: Trace) -> None:
    """`x · rsqrt(mean(x²) + eps)`, and the weight it may be multiplied by, become one `rms_norm`."""
    for node, name in operations(trace):
        factors: Any = node.args
        if name != "mul" or not all(isinstance(factor, fx.Node) for factor in factors):
            continue
        for x, factor in (factors, factors[::-1]):
            eps = _rms_epsilon(x, factor)
            if eps is None:
                continue
            last, weight = _scaled(trace, node)
            with trace.graph.inserting_before(last):
                channels = [int(value_of(x).shape[-1])]
                new = insert(trace, last, ATEN.rms_norm.default, x, channels, weight, eps)
            replace(trace, last, new)
            break


def _rms_epsilon(x: Any, factor: Any) -> float | None:
    """Return eps if ``factor`` is `rsqrt(mean(x², -1) + eps)`, else None."""
    if operation(factor) != "rsqrt" or operation(factor.args[0]) != "add":
        return None
    mean, eps = factor.args[0].args[:2]
    if isinstance(eps, fx.Node) or operation(mean) != "mean":
        return None
    power = mean.args[0]
    over_channels = list(mean.args[1]) in ([-1], [value_of(x).ndim - 1])
    squares = operation(power) == "pow" and power.args == (x, 2)
    return float(eps) if over_channels and squares else None


def _scaled(trace: Trace, norm: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """Return the product of a norm and its weight, and the weight; the norm itself if it has none."""
    product = next(iter(norm.users))
    if len(norm.users) == 1 and product.op == "call_function" and operation(product) == "mul":
        weight: Any = product.args[1] if product.args[0] is norm else product.args[0]
        shape = (value_of(norm).shape[-1],)
        if weight in trace.weights and value_of(weight).shape == shape:
            return product, weight
    return norm, None
