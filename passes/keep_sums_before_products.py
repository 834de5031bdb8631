# SPDX-License-Identifier: Apache-2.0
"""Put a node that changes nothing between a sum with a constant and a product with one."""

from __future__ import annotations

import onnx_ir as ir

from .base import Pass, PassResult

__all__ = ["KeepSumsBeforeProducts"]


class KeepSumsBeforeProducts(Pass):
    """Write (x + a) · b as LeakyRelu(x + a) · b, of slope 1, where a and b are constants.

    OpenVINO makes x · b + a · b of it, which loses digits where b is large: LTX-2 multiplies positions
    from -1 to 1 by up to 15,708 and takes the sine, and 2e-3 was seen in it (OpenVINO 2026.4). It
    keeps this node, which changes no value, NaN neither.
    """

    def run(self, model: ir.Model) -> PassResult:
        """Put the nodes there."""
        sums = [n for n in model.graph if n.op_type in ("Add", "Sub") and is_scaled_sum(n)]
        for node in sums:
            keep(model.graph, node)
        return PassResult(model, changed=bool(sums))


def is_scaled_sum(node: ir.Node) -> bool:
    """Tell whether a float32 sum with a constant is multiplied by one."""
    (total,) = node.outputs
    products = [user for user in total.consumers() if user.op_type == "Mul"]
    return (
        total.dtype == ir.DataType.FLOAT
        and any(is_constant(value) for value in node.inputs)
        and any(is_constant(value) for product in products for value in product.inputs)
    )


def is_constant(value: ir.Value | None) -> bool:
    """Tell whether a value is a number, or several, known when the graph is compiled."""
    if value is None:
        return False
    made_by = value.producer()
    return value.const_value is not None or (made_by is not None and made_by.op_type == "Constant")


def keep(graph: ir.Graph, node: ir.Node) -> None:
    """Let everything that reads a sum read it through the new node."""
    (total,) = node.outputs
    added = ir.node("LeakyRelu", [total], {"alpha": 1.0}, name=f"{total.name}_kept")
    (kept,) = added.outputs
    kept.type, kept.shape, kept.name = total.type, total.shape, f"{total.name}_kept"
    graph.insert_after(node, added)
    for user, place in [*total.uses()]:
        if user is not added:
            user.replace_input_with(place, kept)
