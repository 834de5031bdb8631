# SPDX-License-Identifier: Apache-2.0
"""Write Attention nodes as ONNX Runtime's own MultiHeadAttention, which keeps no scores."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .base import Pass, PassResult

__all__ = ["MultiHeadAttention"]

DOMAIN = "com.microsoft"


class MultiHeadAttention(Pass):
    """Replace each plain Attention over [batch, heads, tokens, size] by the contributed operator.

    ONNX Runtime 1.32 computes ``Attention`` on a CPU by writing all scores out, heads × tokens² of
    them: 51 GB for Wan 1.3B at 480 × 832 × 81. Its ``MultiHeadAttention`` over [batch, tokens,
    channels] goes through them tile by tile (Dao et al. 2022, arXiv 2205.14135) as long as it
    has neither mask nor past. Attention with either, and heads of unknown number or size, stay.
    """

    def run(self, model: ir.Model) -> PassResult:
        """Replace them."""
        nodes = [n for n in model.graph if n.op_type == "Attention" and is_plain(n)]
        for node in nodes:
            replace_attention(model.graph, node)
        if nodes:
            model.opset_imports[DOMAIN] = 1
        return PassResult(model, changed=bool(nodes))


def is_plain(node: ir.Node) -> bool:
    """Tell whether a node is softmax(q·kᵀ·scale)·v over 4-D tensors and nothing more."""
    others = set(node.attributes) - {"scale"}
    query = node.inputs[0]
    is_known = query is not None and query.shape is not None and len(query.shape) == 4
    return (
        node.domain == ""
        and len(node.inputs) == 3
        and len(node.outputs) == 1
        and not any(node.attributes[name].value for name in others)
        and is_known
        and all(isinstance(query.shape[axis], int) for axis in (1, 3))  # type: ignore[index, union-attr]  # is_known
    )


def replace_attention(graph: ir.Graph, node: ir.Node) -> None:
    """Replace one node."""
    query = node.inputs[0]
    assert query is not None
    assert query.shape is not None
    heads, size = int(query.shape[1]), int(query.shape[3])  # type: ignore[arg-type]  # is_plain
    name = node.outputs[0].name
    tape = ir.tape.Tape()

    def constant(label: str, values: list[int]) -> ir.Value:
        return tape.initializer(ir.tensor(np.array(values, dtype=np.int64), name=f"{name}_{label}"))

    joined, split = constant("joined", [0, 0, -1]), constant("heads", [0, 0, heads, size])
    by_token = {"perm": [0, 2, 1, 3]}
    inputs = [
        tape.op("Reshape", [tape.op("Transpose", [value], by_token), joined])
        for value in node.inputs
    ]
    attributes: dict[str, int | float] = {"num_heads": heads}
    if "scale" in node.attributes:
        attributes["scale"] = node.attributes.get_float("scale")
    attended = tape.op("MultiHeadAttention", inputs, attributes, domain=DOMAIN, version=1)
    result = tape.op("Transpose", [tape.op("Reshape", [attended, split])], by_token)
    result.type, result.shape = node.outputs[0].type, node.outputs[0].shape
    for value in tape.initializers:
        graph.initializers.add(value)
    ir.convenience.replace_nodes_and_values(graph, node, [node], tape.nodes, node.outputs, [result])
