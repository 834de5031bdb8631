# SPDX-License-Identifier: Apache-2.0
"""Write RotaryEmbedding nodes out as products with small constant matrices."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ..core.errors import PassError
from .base import Pass, PassResult

__all__ = ["DecomposeRotaryEmbedding"]

WIDEST = 128
"""Channels that one matrix turns. A model that rotates all of its width at once, before heads are split
(LTX), would else multiply with a matrix as large as a projection's."""


class DecomposeRotaryEmbedding(Pass):
    """Replace each RotaryEmbedding over [batch, heads, tokens, size] by ``x·C + (x T)·S``.

    ``T`` takes each pair (a, b) of channels, neighbours or half a head apart, to (−b, a); ``C`` and
    ``S`` are the tables with every angle twice. Both come from products with matrices of 0, 1 and −1, which are exact.

    NOTE: OpenVINO 2026.4.1 computes the interleaved operator wrongly on CPUs without AVX-512 (it
    reads beyond its inputs). Written with Split and Concat of pairs it took 18 % of a bfloat16
    block of Wan 1.3B at 1,560 tokens; this form takes 4 %. Pairs of neighbours are turned in
    groups of `WIDEST` channels at most: over LTX-2's 4,096 at once, 19 % of a block at 480 tokens.
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
        PassError: the node has position ids, or the size of a head is not fixed.
    """
    x, cos, sin = node.inputs[:3]
    size = x.shape[-1] if x is not None and x.shape is not None and len(x.shape) == 4 else None
    if len(node.inputs) > 3 or not isinstance(size, int):
        raise PassError(
            f"graph '{graph.name}', node '{node.name}'",
            "is a RotaryEmbedding of a form that this pass does not write out",
            "export it over [batch, heads, tokens, size] without position ids",
        )
    assert x is not None, "its shape was looked at"
    assert x.dtype is not None, "dtypes were inferred"
    name, float_dtype = node.outputs[0].name, x.dtype.numpy()
    tape = ir.tape.Tape()
    constants: dict[str, ir.Value] = {}

    def constant(label: str, values: NDArray[Any]) -> ir.Value:
        if label not in constants:
            dtype = np.int64 if values.dtype == np.int64 else float_dtype
            tensor = ir.tensor(values.astype(dtype), name=f"{name}_{label}")
            constants[label] = tape.initializer(tensor)
        return constants[label]

    def multiplied(value: ir.Value | None, axes: int, label: str, matrix: NDArray[Any]) -> ir.Value:
        """Multiply each group of channels, which follow so many other axes, with a matrix."""
        by = constant(label, matrix)
        if group == size:
            return tape.op("MatMul", [value, by])
        same = [0] * axes  # Reshape keeps these axes
        parts = constant(f"{label}_parts", np.array([*same, size // group, len(matrix)]))
        whole = constant(f"{label}_whole", np.array([*same, size]))
        product = tape.op("MatMul", [tape.op("Reshape", [value, parts]), by])
        return tape.op("Reshape", [product, whole])

    group = size
    pair = np.arange(size // 2)
    first, second = pair, pair + size // 2
    if node.attributes.get_int("interleaved", 0) == 1:
        group = max(g for g in range(2, min(size, WIDEST) + 1, 2) if size % g == 0)
        pair = np.arange(group // 2)
        first, second = 2 * pair, 2 * pair + 1
    turn, twice = np.zeros((group, group)), np.zeros((group // 2, group))
    turn[second, first], turn[first, second] = -1, 1
    twice[pair, first] = twice[pair, second] = 1
    heads = constant("heads", np.array([1]))
    c, s = (tape.op("Unsqueeze", [multiplied(t, 2, "twice", twice), heads]) for t in (cos, sin))
    turned = multiplied(x, 3, "turn", turn)
    result = tape.op("Add", [tape.op("Mul", [x, c]), tape.op("Mul", [turned, s])])
    result.type, result.shape = node.outputs[0].type, node.outputs[0].shape
    for value in tape.initializers:
        graph.initializers.add(value)
    ir.convenience.replace_nodes_and_values(graph, node, [node], tape.nodes, node.outputs, [result])
