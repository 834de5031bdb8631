# SPDX-License-Identifier: Apache-2.0
"""Fold constants and remove dead or duplicate nodes with onnxscript's optimizer."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnxscript import optimizer

from .base import Pass, PassResult

__all__ = ["OptimizeGraph"]


class OptimizeGraph(Pass):
    """Run onnxscript's optimizer: inlining, constant folding, dead-code and CSE."""

    def run(self, model: ir.Model) -> PassResult:
        """Optimise in place."""
        before = _fingerprint(model)
        kept = _keep_small_numbers(model)
        optimizer.optimize(model)
        return PassResult(model, changed=kept or _fingerprint(model) != before)


TAKEN_FOR_ZERO = 1e-8
"""Up to which number onnxscript's `x + 0 = x` takes a scalar for zero."""


def _keep_small_numbers(model: ir.Model) -> bool:
    """Give each scalar that would be taken for zero, and is none, one dimension; say if there was one.

    Linear attention adds 1e-15 to what it divides by.
    """
    found = False
    for value in model.graph.initializers.values():
        if (small := _small(value.const_value)) is not None:
            value.const_value, value.shape, found = small, ir.Shape([1]), True
    for node in model.graph:
        if node.op_type == "Constant" and "value" in node.attributes:
            small = _small(node.attributes["value"].as_tensor())
            if small is not None:
                node.attributes["value"] = ir.AttrTensor("value", small)
                node.outputs[0].shape, found = ir.Shape([1]), True
    return found


def _small(tensor: ir.TensorProtocol | None) -> ir.TensorProtocol | None:
    """Return a small scalar as a vector of one; None of everything else."""
    if tensor is None or len(tensor.shape) or not tensor.dtype.is_floating_point():
        return None
    number = tensor.numpy()
    if number == 0 or abs(float(number)) > TAKEN_FOR_ZERO:
        return None
    return ir.tensor(np.reshape(number, 1), name=tensor.name)


def _fingerprint(model: ir.Model) -> list[tuple[str, tuple[str | None, ...]]]:
    """List each node's operator and inputs; enough to see whether a rewrite happened."""
    return [
        (node.op_type, tuple(v.name if v is not None else None for v in node.inputs))
        for node in model.graph
    ]
