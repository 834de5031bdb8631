# SPDX-License-Identifier: Apache-2.0
"""Fold constants and remove dead or duplicate nodes with onnxscript's optimizer."""

from __future__ import annotations

import onnx_ir as ir
from onnxscript import optimizer

from .base import Pass, PassResult

__all__ = ["OptimizeGraph"]


class OptimizeGraph(Pass):
    """Run onnxscript's optimizer: inlining, constant folding, dead-code and CSE."""

    def run(self, model: ir.Model) -> PassResult:
        """Optimise in place."""
        before = _fingerprint(model)
        optimizer.optimize(model)
        return PassResult(model, changed=_fingerprint(model) != before)


def _fingerprint(model: ir.Model) -> list[tuple[str, tuple[str | None, ...]]]:
    """List each node's operator and inputs; enough to see whether a rewrite happened."""
    return [
        (node.op_type, tuple(v.name if v is not None else None for v in node.inputs))
        for node in model.graph
    ]
