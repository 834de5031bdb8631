# SPDX-License-Identifier: Apache-2.0
"""Give masks of Attention that are the same for every query one row per query."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .base import Pass, PassResult

__all__ = ["ExpandAttentionMasks"]


class ExpandAttentionMasks(Pass):
    """Expand each mask [batch, heads or 1, 1, keys] to [batch, heads or 1, queries, keys].

    ONNX lets a mask broadcast; ONNX Runtime 1.32 refuses one whose rows are not as many as the
    queries ("inconsistent q_sequence_length"). It writes all scores out where there is a mask, so
    the expanded one adds a part in ``heads`` to that memory.
    """

    def run(self, model: ir.Model) -> PassResult:
        """Expand them."""
        nodes = [n for n in model.graph if n.op_type == "Attention" and has_one_row(n)]
        for node in nodes:
            expand_mask(model.graph, node)
        return PassResult(model, changed=bool(nodes))


def has_one_row(node: ir.Node) -> bool:
    """Tell whether a node has a 4-D mask with one row for all queries."""
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    shape = mask.shape if mask is not None else None
    return node.domain == "" and shape is not None and len(shape) == 4 and shape[2] == 1


def expand_mask(graph: ir.Graph, node: ir.Node) -> None:
    """Expand one node's mask."""
    query, mask = node.inputs[0], node.inputs[3]
    assert query is not None
    assert mask is not None
    assert mask.shape is not None
    name = f"{node.outputs[0].name}_mask"
    tape = ir.tape.Tape()
    one = ir.tensor(np.array([1], dtype=np.int64), name=f"{name}_one")
    ones = tape.initializer(one)
    queries = tape.op("Shape", [query], {"start": 2, "end": 3})
    rows = tape.op("Concat", [ones, ones, queries, ones], {"axis": 0})
    expanded = tape.op("Expand", [mask, rows])
    expanded.type = mask.type
    columns = query.shape[2] if query.shape is not None else None
    expanded.shape = ir.Shape([mask.shape[0], mask.shape[1], columns, mask.shape[3]])
    for value in tape.initializers:
        graph.initializers.add(value)
    graph.insert_before(node, tape.nodes)
    node.replace_input_with(3, expanded)
