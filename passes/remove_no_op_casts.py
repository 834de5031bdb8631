# SPDX-License-Identifier: Apache-2.0
"""Remove Cast nodes whose input already has the target dtype."""

from __future__ import annotations

import onnx_ir as ir

from .base import Pass, PassResult

__all__ = ["RemoveNoOpCasts"]


class RemoveNoOpCasts(Pass):
    """Drop each Cast that changes nothing, keeping graph output names."""

    def run(self, model: ir.Model) -> PassResult:
        """Drop them."""
        redundant = [node for node in model.graph if is_no_op_cast(node)]
        outputs = set(model.graph.outputs)
        changed = False
        for node in redundant:
            source, result = node.inputs[0], node.outputs[0]
            assert source is not None, "a Cast has an input"
            if result in outputs:
                continue
            ir.convenience.replace_all_uses_with(result, source)
            model.graph.remove(node, safe=True)
            changed = True
        return PassResult(model, changed)


def is_no_op_cast(node: ir.Node) -> bool:
    """Tell whether ``node`` casts a value to the dtype it has."""
    if node.op_type != "Cast" or node.inputs[0] is None:
        return False
    return node.inputs[0].dtype is not None and node.inputs[0].dtype == node.outputs[0].dtype
