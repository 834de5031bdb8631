# SPDX-License-Identifier: Apache-2.0
"""Constants fold, dead and duplicate nodes go, weights that are inputs stay untouched."""

from __future__ import annotations

import numpy as np
import pytest

from freewheel.passes import OptimizeGraph

REDUNDANT = """
g (float[n, 2] x) => (float[n, 2] y)
<float[2] a = {1, 2}, float[2] b = {3, 4}> {
    folded = Add(a, b)
    dead = Mul(x, a)
    first = Mul(x, folded)
    second = Mul(x, folded)
    y = Add(first, second)
}
"""

TEMPLATE = """
g (float[n, 2] x, float[2, 3] weight) => (float[n, 3] y) {
    y = MatMul(x, weight)
}
"""


def test_redundant_nodes_go_and_values_stay(parse, rewrite, evaluate) -> None:
    model = parse(REDUNDANT)
    x = np.array([[1, -1], [0.5, 2]], dtype=np.float32)
    expected = evaluate(model, {"x": x})["y"]
    assert rewrite(model, OptimizeGraph())
    assert [n.op_type for n in model.graph] == ["Mul", "Add"]
    np.testing.assert_array_equal(evaluate(model, {"x": x})["y"], expected)


def test_a_minimal_template_is_left_alone(parse, rewrite) -> None:
    model = parse(TEMPLATE)
    assert not rewrite(model, OptimizeGraph())
    assert [v.name for v in model.graph.inputs] == ["x", "weight"]


def test_a_transposed_weight_input_is_not_folded_away(parse, rewrite) -> None:
    model = parse(
        "g (float[n, 2] x, float[3, 2] weight) => (float[n, 3] y)"
        "{ t = Transpose<perm = [1, 0]>(weight)  y = MatMul(x, t) }"
    )
    assert not rewrite(model, OptimizeGraph())
    assert [n.op_type for n in model.graph] == ["Transpose", "MatMul"]


@pytest.mark.parametrize(
    "number",
    ["<float small = {1e-15}> {", "{ small = Constant <value = float {1e-15}> ()"],
    ids=["initializer", "node"],
)
def test_a_small_number_is_no_zero(parse, rewrite, evaluate, number: str) -> None:
    model = parse(
        f"g (float[n] x) => (float[n] y) {number} sum = Add(x, small)  y = Div(x, sum) }}"
    )
    rewrite(model, OptimizeGraph())
    found = evaluate(model, {"x": np.zeros(2, dtype=np.float32)})["y"]
    np.testing.assert_array_equal(found, [0, 0])
