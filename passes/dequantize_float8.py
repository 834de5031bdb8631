# SPDX-License-Identifier: Apache-2.0
"""Read float8 by the one operator through which TensorRT takes it: DequantizeLinear, with scale 1."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .base import Pass, PassResult

__all__ = ["DequantizeFloat8"]


class DequantizeFloat8(Pass):
    """Replace each Cast of float8_e4m3fn to float32 by a DequantizeLinear of equal result."""

    def run(self, model: ir.Model) -> PassResult:
        """Replace them."""
        casts = [node for node in model.graph if reads_float8(node)]
        if not casts:
            return PassResult(model, changed=False)
        one = ir.Value(name="float8_one", const_value=ir.tensor(np.float32(1.0), name="float8_one"))
        model.graph.initializers.add(one)
        for cast in casts:
            node = ir.node("DequantizeLinear", [cast.inputs[0], one])
            result, wide = node.outputs[0], cast.outputs[0]
            result.dtype, result.shape, result.name = ir.DataType.FLOAT, wide.shape, wide.name
            model.graph.insert_before(cast, node)
            ir.convenience.replace_all_uses_with(wide, result)
            model.graph.remove(cast, safe=True)
        return PassResult(model, changed=True)


def reads_float8(node: ir.Node) -> bool:
    """Tell whether ``node`` casts float8_e4m3fn to float32."""
    if node.op_type != "Cast" or node.inputs[0] is None:
        return False
    is_to_float32 = node.attributes.get_int("to") == ir.DataType.FLOAT
    return is_to_float32 and node.inputs[0].dtype == ir.DataType.FLOAT8E4M3FN
