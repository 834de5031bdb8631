# SPDX-License-Identifier: Apache-2.0
"""Write interleaved RotaryEmbedding nodes out as multiplications and additions."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ..configs.errors import PassError
from .base import Pass, PassResult

__all__ = ["DecomposeRotaryEmbedding"]


class DecomposeRotaryEmbedding(Pass):
    """Replace each RotaryEmbedding over [batch, heads, tokens, size] by its definition.

    NOTE: OpenVINO 2026.4.1 computes the interleaved operator wrongly on CPUs without AVX-512 (it
    reads beyond its inputs); its elementwise form is right and as fast there.
    """

    def run(self, model: ir.Model) -> PassResult:
        """Replace them."""
        nodes = [n for n in model.graph if n.op_type == "RotaryEmbedding"]
        for node in nodes:
            replace_rotary_embedding(model.graph, node)
        return PassResult(model, changed=bool(nodes))


def replace_rotary_embedding(graph: ir.Graph, node: ir.Node) -> None:
    """Replace one node.

    Raises:
        PassError: the node is not the interleaved form without position ids, or the size of a head
            is not fixed.
    """
    x, cos, sin = node.inputs[:3]
    is_interleaved = node.attributes.get_int("interleaved", 0) == 1
    size = x.shape[-1] if x is not None and x.shape is not None and len(x.shape) == 4 else None
    if not is_interleaved or len(node.inputs) > 3 or not isinstance(size, int):
        raise PassError(
            f"graph '{graph.name}', node '{node.name}'",
            "is a RotaryEmbedding of a form that this pass does not write out",
            "export with interleaved=True over [batch, heads, tokens, size] without position ids",
        )
    name = node.outputs[0].name
    tape = ir.tape.Tape()

    def constant(label: str, values: list[int]) -> ir.Value:
        return tape.initializer(ir.tensor(np.array(values, dtype=np.int64), name=f"{name}_{label}"))

    pairs = tape.op("Reshape", [x, constant("pairs", [0, 0, 0, size // 2, 2])])
    first, second = tape.op_multi_out(
        "Split", [pairs], {"axis": -1, "num_outputs": 2}, num_outputs=2
    )
    axes = constant("axes", [1, 4])
    c, s = tape.op("Unsqueeze", [cos, axes]), tape.op("Unsqueeze", [sin, axes])
    rotated = [
        tape.op("Sub", [tape.op("Mul", [first, c]), tape.op("Mul", [second, s])]),
        tape.op("Add", [tape.op("Mul", [first, s]), tape.op("Mul", [second, c])]),
    ]
    joined = tape.op("Concat", rotated, {"axis": -1})
    result = tape.op("Reshape", [joined, constant("joined", [0, 0, 0, size])])
    result.type, result.shape = node.outputs[0].type, node.outputs[0].shape
    for value in tape.initializers:
        graph.initializers.add(value)
    ir.convenience.replace_nodes_and_values(graph, node, [node], tape.nodes, node.outputs, [result])
