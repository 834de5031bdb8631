# SPDX-License-Identifier: Apache-2.0
"""Weights become inputs, and nothing else does."""

from __future__ import annotations

import numpy as np

from freewheel.passes import WeightsAsInputs

LINEAR = """
g (float[n, 2] x) => (float[n, 2] y)
<float[2, 2] weight = {1, 2, 3, 4}, float[2] bias = {10, 20}, float[1] one = {1}> {
    p = MatMul(x, weight)
    q = Add(p, bias)
    y = Mul(q, one)
}
"""


def test_named_initializers_become_the_last_inputs_in_their_order(parse, rewrite, evaluate) -> None:
    model = parse(LINEAR)
    x = np.array([[1, -1], [0, 2]], dtype=np.float32)
    expected = evaluate(model, {"x": x})["y"]
    assert rewrite(model, WeightsAsInputs(["bias", "weight"]))
    assert [v.name for v in model.graph.inputs] == ["x", "weight", "bias"]
    assert list(model.graph.initializers) == ["one"]
    feeds = {
        "x": x,
        "weight": np.array([[1, 2], [3, 4]], dtype=np.float32),
        "bias": np.array([10, 20], dtype=np.float32),
    }
    np.testing.assert_array_equal(evaluate(model, feeds)["y"], expected)


def test_another_blocks_weights_give_another_result(parse, rewrite, evaluate) -> None:
    model = parse(LINEAR)
    rewrite(model, WeightsAsInputs(["weight", "bias"]))
    feeds = {
        "x": np.ones((1, 2), np.float32),
        "weight": np.eye(2, dtype=np.float32),
        "bias": np.zeros(2, np.float32),
    }
    np.testing.assert_array_equal(evaluate(model, feeds)["y"], feeds["x"])


def test_initializers_that_are_no_weights_stay(parse, rewrite) -> None:
    model = parse(LINEAR)
    assert not rewrite(model, WeightsAsInputs(["absent"]))
    assert [v.name for v in model.graph.inputs] == ["x"]
    assert list(model.graph.initializers) == ["weight", "bias", "one"]
