# SPDX-License-Identifier: Apache-2.0
"""Give Attention nodes that share their query scales of their own."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .base import Pass, PassResult

__all__ = ["DistinctAttentionScales"]


class DistinctAttentionScales(Pass):
    """Multiply the keys of each further Attention of a query by a power of two, and divide its scale.

    Powers of two are exact, so the scores are what they were.

    NOTE: TensorRT-RTX 1.7 crashes where it compiles two attentions of one query with one scale,
    as Wan's image-to-video blocks have them (text and image).
    """

    def run(self, model: ir.Model) -> PassResult:
        """Change as few as that takes; those of another scale stay as they are."""
        taken: dict[ir.Value, set[float]] = {}
        changed = False
        for node in [n for n in model.graph if n.op_type == "Attention"]:
            query = node.inputs[0]
            scale = _scale_of(node)
            if query is None or scale is None:
                continue
            others, factor = taken.setdefault(query, set()), 1.0
            while scale / factor in others:
                factor *= 2
            others.add(scale / factor)
            if factor > 1:
                _rescale(model.graph, node, scale / factor, factor)
                changed = True
        return PassResult(model, changed=changed)


def _scale_of(node: ir.Node) -> float | None:
    """Return the factor of a node's scores; None where it goes by a head size that isn't known."""
    given = node.attributes.get_float("scale")
    if given is not None:
        return float(np.float32(given))
    query = node.inputs[0]
    shape = None if query is None else query.shape
    size = shape[-1] if shape is not None and len(shape) == 4 else None
    return float(np.float32(size**-0.5)) if isinstance(size, int) else None


def _rescale(graph: ir.Graph, node: ir.Node, scale: float, factor: float) -> None:
    key = node.inputs[1]
    assert key is not None, "an Attention has a key"
    assert key.dtype is not None, "dtypes are inferred before backends' passes"
    name = f"{node.outputs[0].name}_key"
    tape = ir.tape.Tape()
    value = ir.tensor(np.array(factor, dtype=key.dtype.numpy()), name=f"{name}_factor")
    product = tape.op("Mul", [key, tape.initializer(value)])
    product.name, product.type, product.shape = name, key.type, key.shape
    for initializer in tape.initializers:
        graph.initializers.add(initializer)
    graph.insert_before(node, tape.nodes)
    node.replace_input_with(1, product)
    node.attributes["scale"] = ir.AttrFloat32("scale", scale)
