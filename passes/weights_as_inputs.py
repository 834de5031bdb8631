# SPDX-License-Identifier: Apache-2.0
"""Turn the weights of a traced module into graph inputs, so that one graph serves every block."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

from .base import Pass, PassResult

__all__ = ["WeightsAsInputs"]


class WeightsAsInputs(Pass):
    """Move the named initializers to the end of the graph's inputs, keeping their order.

    Runs before any optimisation: constant folding would otherwise transpose the weights, lose
    their names and fail on tensors that have no data.
    """

    def __init__(self, names: Collection[str]) -> None:
        self.names = names

    def run(self, model: ir.Model) -> PassResult:
        """Move them."""
        graph = model.graph
        moved = [name for name in graph.initializers if name in self.names]
        for name in moved:
            value = graph.initializers.pop(name)
            value.const_value = None
            graph.inputs.append(value)
        return PassResult(model, changed=bool(moved))
