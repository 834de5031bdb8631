# SPDX-License-Identifier: Apache-2.0
"""Let a block compute what its own model computes between it and the block before.

Bria FIBO takes a part out of each block's text, and joins it with a text of the next block's own.
Where each of several equal blocks has the same before it, that is a part of the block: one graph,
not one more between every two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from .blocks import find_templates
from .trace import Trace, value_of
from .words import PRODUCTS, Instance, expression_of, is_operation, is_size, operation, tensors_read

__all__ = ["bring_into_blocks"]


def bring_into_blocks(trace: Trace, instances: Sequence[Instance]) -> None:
    """Give blocks what is computed before each of them alone, if it is the same for equal blocks.

    Args:
        trace: Traced; the nodes become the blocks' own.
        instances: Its blocks.
    """
    owner = {node: instance for instance in instances for node in instance.nodes}
    for template in find_templates(trace, list(instances)):
        *others, last = template.instances
        pattern = _before(trace, last, owner)
        found = [_alike(trace, one, last, pattern, owner) for one in others]
        if not all([pattern, found, *found]):
            continue
        for instance, nodes in zip([*others, last], [*found, pattern], strict=True):
            for node in nodes:
                node.meta["nn_module_stack"] = instance.nodes[0].meta["nn_module_stack"]


def _before(trace: Trace, block: Instance, owner: dict[fx.Node, Instance]) -> set[fx.Node]:
    """Return what is computed of earlier blocks' results for a block alone, without weights."""
    of_blocks = set(owner)
    for node in trace.graph.nodes:
        if is_operation(node) and not of_blocks.isdisjoint(tensors_read(node)):
            of_blocks.add(node)
    found: set[fx.Node] = set()
    for node in reversed(trace.graph.nodes):
        if node in of_blocks and _is_for(node, block, found, owner) and _is_plain(trace, node):
            found.add(node)
    return found


def _is_for(
    node: fx.Node, block: Instance, found: set[fx.Node], owner: dict[fx.Node, Instance]
) -> bool:
    """Say whether a node lies outside blocks, and one block alone reads it; who measures it does not."""
    readers = [user for user in node.users if not is_size(user)]
    return (
        node not in owner
        and bool(readers)
        and all(owner.get(user) is block or user in found for user in readers)
    )


def _is_plain(trace: Trace, node: fx.Node) -> bool:
    """Say whether an operation is no product and reads no weight."""
    reads_weight = any(n in trace.weights or n in trace.constants for n in node.all_input_nodes)
    return operation(node) not in PRODUCTS and not reads_weight


def _alike(
    trace: Trace,
    block: Instance,
    other: Instance,
    pattern: set[fx.Node],
    owner: dict[fx.Node, Instance],
) -> set[fx.Node]:
    """Return what is computed for a block as a pattern is for another; empty if something differs."""
    found: set[fx.Node] = set()
    pairs: list[tuple[Any, Any]] = [
        (own, like) for own, like in zip(block.slots, other.slots, strict=True) if like in pattern
    ]
    while pairs:
        own, like = pairs.pop()
        if isinstance(like, (list, tuple)) and isinstance(own, (list, tuple)):
            if len(own) != len(like):
                return set()
            pairs += zip(own, like, strict=True)
        elif isinstance(like, fx.Node) and like in pattern:
            is_same = isinstance(own, fx.Node) and own.target == like.target
            if not is_same or len(own.args) != len(like.args) or own.kwargs != like.kwargs:
                return set()
            found.add(own)
            pairs += zip(own.args, like.args, strict=True)
        elif _spelled(own) != _spelled(like):
            return set()
    is_whole = all(_is_for(n, block, found, owner) and _is_plain(trace, n) for n in found)
    return found if is_whole else set()


def _spelled(argument: Any) -> Any:
    """Return a number, the expression of a size, or of any tensor one word."""
    if not isinstance(argument, fx.Node):
        return argument
    return expression_of(value_of(argument)) if is_size(argument) else "tensor"
