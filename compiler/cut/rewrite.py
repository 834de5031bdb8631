# SPDX-License-Identifier: Apache-2.0
"""Add and replace nodes of a traced graph, keeping every node's fake tensor true."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from .trace import Trace, value_of
from .words import is_operation, operation

__all__ = ["infer", "insert", "operations", "replace"]


def operations(trace: Trace) -> Iterator[tuple[fx.Node, str]]:
    """Yield each node that computes tensors, with its operation's name; nodes may be erased."""
    for node in list(trace.graph.nodes):
        if is_operation(node):
            yield node, operation(node)


def insert(trace: Trace, like: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """Add an operation at the graph's insertion point, as of ``like``'s module and source line."""
    node = trace.graph.call_function(target, args, kwargs)
    node.meta = {key: value for key, value in like.meta.items() if key != "val"}
    infer(trace, node)
    return node


def infer(trace: Trace, node: fx.Node) -> None:
    """Compute a node's fake tensor anew of its arguments'."""
    with trace.mode, torch.no_grad():
        node.meta["val"] = node.target(  # type: ignore[operator]  # a function, not a module's name
            *fx.map_arg(node.args, value_of), **fx.map_arg(node.kwargs, value_of)
        )


def replace(trace: Trace, old: fx.Node, new: fx.Node) -> None:
    """Let all users of one node read another, and erase the one."""
    old.replace_all_uses_with(new)
    trace.results = tuple(new if node is old else node for node in trace.results)
    trace.graph.erase_node(old)
