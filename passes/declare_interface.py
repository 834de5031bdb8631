# SPDX-License-Identifier: Apache-2.0
"""Give a graph the interface it was declared with: order, names, dtypes and named dimensions."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from ..core.errors import PassError
from ..core.tensor_spec import TensorSpec
from .base import Pass, PassResult

__all__ = ["DeclareInterface"]


class DeclareInterface(Pass):
    """Write declared dimension names onto inputs and outputs, and drop outputs not declared.

    The exporter invents a symbol per dynamic dimension and an expression per derived one; runtimes
    allocate buffers from the declared names instead.
    """

    def __init__(self, inputs: Mapping[str, TensorSpec], outputs: Mapping[str, TensorSpec]) -> None:
        self.inputs, self.outputs = inputs, outputs

    def requires(self, model: ir.Model) -> None:
        """Check that every declared output is there and has the declared dtype."""
        found = {v.name: v for v in model.graph.outputs}
        for name, spec in self.outputs.items():
            value = found.get(name)
            if value is None:
                raise PassError(f"graph output '{name}'", f"is not among {sorted(map(str, found))}")
            if value.dtype is not None and _spelled(value.dtype) != spec.dtype:
                raise PassError(
                    f"graph output '{name}'", f"is {_spelled(value.dtype)}, declared {spec.dtype}"
                )

    def run(self, model: ir.Model) -> PassResult:
        """Declare."""
        graph = model.graph
        extra = [v for v in graph.outputs if v.name not in self.outputs]
        for value in extra:
            graph.outputs.remove(value)
        if extra:
            ir.passes.common.RemoveUnusedNodesPass()(model)
        changed = bool(extra)
        for values, specs in ((graph.inputs, self.inputs), (graph.outputs, self.outputs)):
            for value in values:
                if (spec := specs.get(str(value.name))) is not None:
                    changed |= _declare(value, spec)
        return PassResult(model, changed)


def _declare(value: ir.Value, spec: TensorSpec) -> bool:
    shape = ir.Shape(list(spec.shape))
    if value.shape is not None and [str(d) for d in value.shape] == [str(d) for d in shape]:
        return False
    value.shape = shape
    return True


def _spelled(dtype: ir.DataType) -> str:
    return {"FLOAT": "float32", "DOUBLE": "float64"}.get(dtype.name, dtype.name.lower())
