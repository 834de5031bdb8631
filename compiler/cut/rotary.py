# SPDX-License-Identifier: Apache-2.0
"""Find rotary embeddings by what they compute, and make each of them one `RotaryEmbedding` node.

A candidate is a part of a block with one input x and one output y of the same shape, made of layout
and elementwise operations, in which x meets tables in at least two products. Evaluated on numbers
it must be a rotation of neighbouring channels, or of channels half a head apart. Its tables are
what it makes of an x that is 1 on one channel of each pair and 0 on the other. The copy that makes
them stands outside the block, so that it is computed once per shape or prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.onnx.ops  # registers torch.ops.onnx.RotaryEmbedding
from torch import Tensor, fx

from .evaluate import Evaluator
from .rewrite import insert, replace
from .tidy import same, size_nodes
from .trace import Trace, value_of
from .words import PRODUCTS, Instance, operation, tensors_read

__all__ = ["compose_rotary"]

ATEN = torch.ops.aten

REGION = frozenset(
    {
        "_to_copy", "add", "alias", "cat", "chunk", "clone", "copy", "expand", "full", "getitem",
        "mul", "neg", "permute", "reshape", "select", "slice", "slice_scatter", "split",
        "split_with_sizes", "squeeze", "stack", "sub", "to", "transpose", "unbind", "unsqueeze",
    }
)  # fmt: skip

LARGEST_REGION = 40
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Rotary:
    """One rotary embedding.

    Attributes:
        x: Queries or keys, [batch, tokens, heads, channels], heads and tokens in either order, or
            without heads.
        y: The same, turned.
        nodes: From x to y, with what they make of tables inside the block.
        tables: What they read from outside.
        interleaved: Whether neighbouring channels make a pair.
        heads: Axis of the heads; 0 where there is none.
        shared: Whether all elements of a batch have the same tables.
    """

    x: fx.Node
    y: fx.Node
    nodes: list[fx.Node]
    tables: list[fx.Node]
    interleaved: bool
    heads: int
    shared: bool


def compose_rotary(trace: Trace, instances: Sequence[Instance]) -> int:
    """Replace every rotary embedding inside blocks; return how many there were."""
    order = {node: i for i, node in enumerate(trace.graph.nodes)}
    evaluator = Evaluator(trace)
    found = [rotary for instance in instances for rotary in _rotaries(instance, order, evaluator)]
    made: dict[Any, tuple[fx.Node, fx.Node]] = {}
    for rotary in found:
        key = _key(rotary)
        if key not in made:
            made[key] = _tables(trace, rotary)
        _replace(trace, rotary, *made[key])
    trace.graph.eliminate_dead_code()
    _cancel_permutations(trace)
    return len(found)


def _rotaries(instance: Instance, order: dict[fx.Node, int], evaluator: Evaluator) -> list[Rotary]:
    """Return the rotary embeddings of a block; each node is part of one at most."""
    data: set[fx.Node] = set()
    for node in instance.nodes:
        if operation(node) in PRODUCTS or not data.isdisjoint(tensors_read(node)):
            data.add(node)
    found: list[Rotary] = []
    taken: set[fx.Node] = set()
    for y in instance.nodes:
        if y not in data or value_of(y) is None or getattr(value_of(y), "ndim", 0) not in (3, 4):
            continue
        region = _region(y, instance, data - taken, order)
        if region is not None:
            x, nodes = region
            rotary = _recognise(x, y, nodes, data, instance, order, evaluator)
            if rotary is not None:
                found.append(rotary)
                taken |= set(nodes)
    return found


def _region(
    y: fx.Node, instance: Instance, data: set[fx.Node], order: dict[fx.Node, int]
) -> tuple[fx.Node, set[fx.Node]] | None:
    """Return x, and the nodes from it to y that depend on it."""
    frontier, region, products = {y}, set[fx.Node](), 0
    while frontier and len(region) < LARGEST_REGION:
        node = max(frontier, key=lambda n: order[n])
        if len(frontier) == 1 and products >= 2 and same(node, y):
            return node, region
        if node not in instance.index or operation(node) not in REGION or node not in data:
            return None
        read = [n for n in tensors_read(node) if n in data]
        if operation(node) == "mul":
            products += 1
            if len(read) != 1:
                return None
        frontier = (frontier - {node}) | set(read)
        region.add(node)
    return None


def _recognise(
    x: fx.Node,
    y: fx.Node,
    region: set[fx.Node],
    data: set[fx.Node],
    instance: Instance,
    order: dict[fx.Node, int],
    evaluator: Evaluator,
) -> Rotary | None:
    """Return a region as a rotary embedding, if it computes one at the traced sizes."""
    inside, tables = set(region), list[fx.Node]()
    waiting = [n for node in region for n in tensors_read(node) if n not in data]
    while waiting:
        node = waiting.pop()
        if node in inside or node in tables:
            continue
        if node in instance.index:
            inside.add(node)
            waiting += tensors_read(node)
        else:
            tables.append(node)
    if not all(evaluator.knows(table) for table in tables):
        return None
    nodes = sorted(inside, key=lambda n: order[n])

    def turned(values: Tensor) -> Tensor:
        result: Tensor = evaluator.run(nodes, {x: values})[y]
        return result

    shape = [int(extent) for extent in evaluator.shape(x)]
    sample = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for interleaved in (True, False):
        cos, sin = _halves(
            turned(_unit(shape[-1], interleaved=interleaved).expand(shape)), interleaved
        )
        if not torch.allclose(
            _rotate(sample, cos, sin, interleaved), turned(sample), atol=TOLERANCE
        ):
            continue
        heads = [
            axis
            for axis in (1, 2)
            if len(shape) == 4 and _is_same(cos, axis) and _is_same(sin, axis)
        ]
        if len(shape) == 4 and not heads:
            return None
        shared = _is_same(cos, 0) and _is_same(sin, 0)
        return Rotary(x, y, nodes, tables, interleaved, heads[0] if heads else 0, shared)
    return None


def _unit(channels: int, *, interleaved: bool) -> Tensor:
    """Return 1 on the first channel of each pair, 0 on the second."""
    unit = torch.zeros(channels)
    unit[slice(0, None, 2) if interleaved else slice(0, channels // 2)] = 1
    return unit


def _halves(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Return the first and the second channels of all pairs."""
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    return first, second


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    first, second = _halves(x, interleaved)
    pair = first * cos - second * sin, first * sin + second * cos
    return torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)


def _is_same(x: Tensor, axis: int) -> bool:
    return torch.equal(x, x.narrow(axis, 0, 1).expand_as(x))


def _key(rotary: Rotary) -> tuple[Any, ...]:
    """Return what two rotary embeddings with the same tables have in common."""
    position = {node: i for i, node in enumerate((rotary.x, *rotary.nodes))}

    def word(node: fx.Node) -> Any:
        return position.get(node, str(value_of(node)) if node.op != "placeholder" else node.name)

    steps = tuple(
        str((node.target, fx.map_arg(node.args, word), fx.map_arg(node.kwargs, word)))
        for node in rotary.nodes
    )
    tables = tuple(sorted(node.name for node in rotary.tables))
    return tables, steps, rotary.interleaved, rotary.heads, rotary.shared


def _tables(trace: Trace, rotary: Rotary) -> tuple[fx.Node, fx.Node]:
    """Add what makes cosines and sines, [batch or 1, tokens, channels / 2], outside the block."""
    x, y = rotary.x, rotary.y
    channels, rank = int(value_of(x).shape[-1]), value_of(x).ndim
    first = next(iter(trace.graph.nodes))
    with trace.graph.inserting_before(first):
        unit = trace.graph.placeholder(f"unit_{y.name}")
    trace.constants[unit] = _unit(channels, interleaved=rotary.interleaved).reshape(
        [1] * (rank - 1) + [channels]
    )
    with trace.mode:
        unit.meta["val"] = torch.zeros(trace.constants[unit].shape)

    with trace.graph.inserting_before(y):
        try:
            turned = _turned(trace, rotary, unit)
        except RuntimeError:  # a shape of the region's own that is no broadcast of the tables'
            size = size_nodes(trace, x)
            turned = _turned(trace, rotary, _outside(trace, y, ATEN.expand.default, unit, size))
        made = []
        for part, name in enumerate(("rope_cos", "rope_sin")):
            start, step = (part, 2) if rotary.interleaved else (part * channels // 2, 1)
            end = channels if rotary.interleaved else start + channels // 2
            table = _outside(trace, y, ATEN.slice.Tensor, turned, -1, start, end, step)
            if rotary.heads:
                table = _outside(trace, y, ATEN.select.int, table, rotary.heads, 0)
            if rotary.shared and value_of(table).shape[0] != 1:
                table = _outside(trace, y, ATEN.slice.Tensor, table, 0, 0, 1)
            table.meta["value_name"] = name
            made.append(table)
    return made[0], made[1]


def _outside(trace: Trace, like: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """Add an operation that belongs to no block."""
    node = insert(trace, like, target, *args, **kwargs)
    node.meta.pop("nn_module_stack", None)
    return node


def _turned(trace: Trace, rotary: Rotary, unit: fx.Node) -> fx.Node:
    """Copy what turns x, with ``unit`` in its place: of size 1 wherever the tables give the size."""
    copies = {rotary.x: unit}
    for node in rotary.nodes:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: copies.get(n, n))
        source: Any = node.args[0]
        if operation(node) == "reshape" and source in copies:
            args = (copies[source], _reshaped(node, value_of(copies[source]).shape))
        copies[node] = _outside(trace, rotary.y, node.target, *args, **kwargs)
    return copies[rotary.y]


def _reshaped(node: fx.Node, shape: Sequence[Any]) -> list[Any]:
    """Return the size that a `reshape` gives a source of another shape, of 1 in leading axes."""
    source, size = cast("tuple[fx.Node, list[Any]]", node.args)
    kept = 0
    for before, after in zip(value_of(source).shape, value_of(node).shape, strict=False):
        if str(before) != str(after):
            break
        kept += 1
    ones = [1 if str(extent) == "1" else asked for extent, asked in zip(shape, size, strict=False)]
    return [*ones[:kept], *size[kept:]]


def _replace(trace: Trace, rotary: Rotary, cos: fx.Node, sin: fx.Node) -> None:
    """Put one node in the place of a rotary embedding: [batch, heads, tokens, channels]."""
    y = rotary.y
    swap = [0, 2, 1, 3]
    with trace.graph.inserting_before(y):
        x = rotary.x
        if rotary.heads == 0:
            x = insert(trace, y, ATEN.unsqueeze.default, x, 1)
        elif rotary.heads == 2:
            x = insert(trace, y, ATEN.permute.default, x, swap)
        if rotary.shared:
            batch: Any = value_of(x).shape[0]
            if isinstance(batch, torch.SymInt):
                batch = insert(trace, y, ATEN.sym_size.int, x, 0)
            cos, sin = (
                insert(trace, y, ATEN.expand.default, t, [batch, -1, -1]) for t in (cos, sin)
            )
        operator = torch.ops.onnx.RotaryEmbedding.opset23
        new = insert(trace, y, operator, x, cos, sin, interleaved=rotary.interleaved)
        if rotary.heads == 0:
            new = insert(trace, y, ATEN.squeeze.dim, new, 1)
        elif rotary.heads == 2:
            new = insert(trace, y, ATEN.permute.default, new, swap)
    replace(trace, y, new)


def _cancel_permutations(trace: Trace) -> None:
    """Drop pairs of permutations that undo each other."""
    for node in list(trace.graph.nodes):
        inner = node.args[0] if node.op == "call_function" and node.args else None
        if not isinstance(inner, fx.Node):
            continue
        outer_axes, inner_axes = _axes(node), _axes(inner)
        if outer_axes is None or inner_axes is None:
            continue
        source: Any = inner.args[0]
        if [inner_axes[axis] for axis in outer_axes] == sorted(inner_axes):
            replace(trace, node, source)
    trace.graph.eliminate_dead_code()


def _axes(node: fx.Node) -> list[int] | None:
    """Return the order of axes that a permutation gives, else None."""
    name, args = operation(node), node.args
    if name not in ("permute", "transpose"):
        return None
    rank = value_of(node).ndim
    given: Any = args[1:]
    if name == "permute":
        return [axis % rank for axis in given[0]]
    axes = list(range(rank))
    one, other = (axis % rank for axis in given)
    axes[one], axes[other] = other, one
    return axes
