# SPDX-License-Identifier: Apache-2.0
"""Take out what a source does to a list of one: a batch of one prompt and one picture.

Models that take each sample's tensor in a list join, split, pad and index that list. Of one sample
these are no operations, or add and drop an axis of one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .rewrite import insert, operations, replace
from .trace import Trace, value_of
from .words import operation

__all__ = ["take_out_lists_of_one"]

ATEN = torch.ops.aten

SPLITS = frozenset({"split", "split_with_sizes", "unbind"})


def take_out_lists_of_one(trace: Trace) -> None:
    """Neither join, split, pad nor index a list of one."""
    for node, name in operations(trace):
        first: Any = node.args[0] if node.args else None
        if name == "cat" and len(first) == 1:
            replace(trace, node, first[0])
        elif name == "pad_sequence" and len(first) == 1:
            batch_first = len(node.args) > 1 and node.args[1]
            _put(trace, node, ATEN.unsqueeze.default, first[0], 0 if batch_first else 1)
        elif name == "select" and _is_one(first, node.args[1]):
            axis: Any = node.args[1]
            _put(trace, node, ATEN.squeeze.dim, first, axis % value_of(first).ndim)
        elif name in SPLITS and len(value_of(node)) == 1:
            _take_the_part(trace, node, name)
    for node, name in operations(trace):
        if name in ("squeeze", "unsqueeze"):
            _cancel(trace, node, name)


def _is_one(node: Any, axis: Any) -> bool:
    """Say whether an axis has one element whatever the sizes are."""
    return str(value_of(node).shape[axis]) == "1"


def _put(trace: Trace, node: fx.Node, target: Any, *args: Any) -> None:
    """Put an operation in a node's place."""
    with trace.graph.inserting_before(node):
        new = insert(trace, node, target, *args)
    replace(trace, node, new)


def _take_the_part(trace: Trace, node: fx.Node, name: str) -> None:
    """Take the one part of a value; `unbind` drops its axis."""
    source: Any = node.args[0]
    axis: Any = node.args[1] if len(node.args) > 1 else 0
    for part in list(node.users):
        if name == "unbind":
            _put(trace, part, ATEN.squeeze.dim, source, axis % value_of(source).ndim)
        else:
            replace(trace, part, source)
    trace.graph.erase_node(node)


def _cancel(trace: Trace, node: fx.Node, name: str) -> None:
    """An axis that was added and is dropped, or the other way round, was never there."""
    inner: Any = node.args[0]
    other = {"squeeze": "unsqueeze", "unsqueeze": "squeeze"}[name]
    if inner.op != "call_function" or operation(inner) != other or len(node.args) < 2:
        return
    wide = value_of(node if name == "unsqueeze" else inner)
    axes = [one.args[1] for one in (node, inner) if len(one.args) > 1]
    if all(isinstance(axis, int) for axis in axes) and len({a % wide.ndim for a in axes}) == 1:
        squeezed = inner if name == "unsqueeze" else node
        source: Any = inner.args[0]
        if _is_one(squeezed.args[0], axes[0]):
            replace(trace, node, source)
