# SPDX-License-Identifier: Apache-2.0
"""Replace shape arithmetic in front of Reshape by a constant with zeros and one -1."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .base import Pass, PassResult

__all__ = ["StaticReshapes"]

COPY, INFER = 0, -1


class StaticReshapes(Pass):
    """Give each Reshape a constant target where ONNX can express it.

    A target dimension equal to the input's dimension at the same place is written 0 (copy), one
    unknown dimension -1 (infer). Engines then need no Shape → Concat chain, which keeps every
    intermediate shape a plain function of the inputs.
    """

    def run(self, model: ir.Model) -> PassResult:
        """Rewrite every Reshape that allows it; dead shape arithmetic goes with it."""
        changed = False
        for node in list(model.graph):
            if node.op_type != "Reshape" or node.inputs[1] is None:
                continue
            if ir.convenience.get_const_tensor(node.inputs[1]) is not None:
                continue
            target = constant_target(node)
            if target is None:
                continue
            name = f"{node.outputs[0].name}_target"
            tensor = ir.tensor(np.array(target, dtype=np.int64), name=name)
            constant = ir.Value(
                name=name,
                shape=ir.Shape([len(target)]),
                type=ir.TensorType(tensor.dtype),
                const_value=tensor,
            )
            model.graph.initializers.add(constant)
            node.replace_input_with(1, constant)
            node.attributes.pop("allowzero", None)
            changed = True
        if changed:
            ir.passes.common.RemoveUnusedNodesPass()(model)
        return PassResult(model, changed)


def constant_target(node: ir.Node) -> list[int] | None:
    """Return the Reshape's target as constants, or None where ONNX can't express it."""
    source, result = node.inputs[0], node.outputs[0]
    if source is None or source.shape is None or result.shape is None:
        return None
    target, unknown = [], 0
    for axis, dim in enumerate(result.shape):
        if isinstance(dim, int):
            if dim == 0:
                return None
            target.append(dim)
        elif dim.value is not None and axis < len(source.shape) and source.shape[axis] == dim:
            target.append(COPY)
        else:
            target.append(INFER)
            unknown += 1
    return target if unknown <= 1 else None
