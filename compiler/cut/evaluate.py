# SPDX-License-Identifier: Apache-2.0
"""Evaluate parts of a traced graph on numbers, at the sizes it was traced with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from .trace import Trace, hint, value_of
from .words import is_size, tensors_read

__all__ = ["Evaluator"]


class Evaluator:
    """Knows the values of everything that depends on inputs, constants and buffers alone.

    Args:
        trace: The graph; its weights have no values.
    """

    def __init__(self, trace: Trace) -> None:
        self.values: dict[fx.Node, Any] = {**trace.examples, **trace.constants}
        buffers = dict(trace.model.named_buffers())
        self.values.update((n, buffers[w]) for n, w in trace.weights.items() if w in buffers)
        self.order = {node: i for i, node in enumerate(trace.graph.nodes)}

    def knows(self, node: fx.Node) -> bool:
        """Say whether a node's value can be computed; computes it."""
        needed: set[fx.Node] = set()
        waiting = [node]
        while waiting:
            one = waiting.pop()
            if one in needed or one in self.values:
                continue
            if one.op != "call_function":
                return False
            needed.add(one)
            waiting += tensors_read(one)
        self.values = self.run(sorted(needed, key=lambda n: self.order[n]), {})
        return True

    def run(self, nodes: Sequence[fx.Node], given: Mapping[fx.Node, Tensor]) -> dict[fx.Node, Any]:
        """Return the values of nodes, in the order of the graph, and all others known."""
        values = {**self.values, **given}

        def argument(node: fx.Node) -> Any:
            return hint(value_of(node)) if is_size(node) else values[node]

        for node in nodes:
            target: Any = node.target
            with torch.no_grad():
                values[node] = target(
                    *fx.map_arg(node.args, argument), **fx.map_arg(node.kwargs, argument)
                )
        return values

    @staticmethod
    def shape(node: fx.Node) -> Iterable[int]:
        """Return a node's shape at the traced sizes."""
        return (hint(extent) for extent in value_of(node).shape)
