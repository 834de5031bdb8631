# SPDX-License-Identifier: Apache-2.0
"""Write ScatterND nodes that add rows as products with a matrix of ones and zeros."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .base import Pass, PassResult

__all__ = ["SumRowsByProduct"]


class SumRowsByProduct(Pass):
    """Replace each ScatterND that adds m rows to n by ``data + P @ rows``, P [n, m] being 1 at each row's place.

    TensorRT scatters, but adds nothing then ("Unsupported reduction type", TensorRT-RTX 1.7). The
    matrix is as large as attention's scores of one head: experts that choose 8 tokens in the mean for
    each token of 4,096 want half a gigabyte of it.
    """

    def run(self, model: ir.Model) -> PassResult:
        """Replace them."""
        nodes = [n for n in model.graph if n.op_type == "ScatterND" and adds_rows(n)]
        for node in nodes:
            replace_scatter(model.graph, node)
        return PassResult(model, changed=bool(nodes))


def adds_rows(node: ir.Node) -> bool:
    """Tell whether a node adds rows, or numbers, each at one index."""
    data, indices, _ = node.inputs
    shapes = [value.shape for value in (data, indices) if value is not None]
    return (
        node.attributes.get_string("reduction", "none") == "add"
        and all(shape is not None for shape in shapes)
        and len(shapes[0]) in (1, 2)  # type: ignore[arg-type]  # looked at above
        and len(shapes[1]) == 2  # type: ignore[arg-type]
        and shapes[1][1] == 1  # type: ignore[index]
    )


def replace_scatter(graph: ir.Graph, node: ir.Node) -> None:
    """Replace one node."""
    data, indices, rows = node.inputs
    assert data is not None
    assert data.dtype is not None, "dtypes were inferred"
    name, tape = node.outputs[0].name, ir.tape.Tape()

    def constant(label: str, value: int | list[int]) -> ir.Value:
        tensor = ir.tensor(np.array(value, dtype=np.int64), name=f"{name}_{label}")
        return tape.initializer(tensor)

    first, one, column = constant("first", 0), constant("one", 1), constant("column", [1])
    length = tape.op("Squeeze", [tape.op("Shape", [data], {"start": 0, "end": 1})])
    places = tape.op("Unsqueeze", [tape.op("Range", [first, length, one]), column])
    wanted = tape.op("Reshape", [indices, constant("row", [1, -1])])
    matrix = tape.op("Cast", [tape.op("Equal", [places, wanted])], {"to": data.dtype.value})
    result = tape.op("Add", [data, tape.op("MatMul", [matrix, rows])])
    result.type, result.shape = node.outputs[0].type, node.outputs[0].shape
    for value in tape.initializers:
        graph.initializers.add(value)
    ir.convenience.replace_nodes_and_values(graph, node, [node], tape.nodes, node.outputs, [result])
