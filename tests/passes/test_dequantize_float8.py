# SPDX-License-Identifier: Apache-2.0
"""Float8 is read through DequantizeLinear and gives what a Cast gave, to the bit."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from freewheel.passes import DequantizeFloat8

TWO = """
g (float[t, 4] x, float8e4m3fn[4, 4] w, float[4, 1] s, float8e4m3fn[4] b) => (float[t, 4] y) {
    wide = Cast<to = 1>(w)
    scaled = Mul(wide, s)
    product = MatMul(x, scaled)
    bias = Cast<to = 1>(b)
    y = Add(product, bias)
}
"""


def test_values_stay_what_they_were(parse, rewrite, evaluate) -> None:
    random = np.random.default_rng(0)
    feeds = {
        "x": random.standard_normal((3, 4)).astype(np.float32),
        "w": random.standard_normal((4, 4)).astype(ml_dtypes.float8_e4m3fn),
        "s": random.random((4, 1)).astype(np.float32),
        "b": random.standard_normal(4).astype(ml_dtypes.float8_e4m3fn),
    }
    model = parse(TWO)
    expected = evaluate(model, feeds)
    assert rewrite(model, DequantizeFloat8())
    operators = [n.op_type for n in model.graph]
    assert (operators.count("Cast"), operators.count("DequantizeLinear")) == (0, 2)
    np.testing.assert_array_equal(evaluate(model, feeds)["y"], expected["y"])


@pytest.mark.parametrize(
    "text",
    [
        "g (bfloat16[n] x) => (float[n] y) { y = Cast<to = 1>(x) }",
        "g (float8e5m2[n] x) => (float[n] y) { y = Cast<to = 1>(x) }",
        "g (float[n] x) => (float8e4m3fn[n] y) { y = Cast<to = 17>(x) }",
    ],
    ids=["16 bits", "another float8", "to float8"],
)
def test_others_are_left_alone(parse, rewrite, text: str) -> None:
    assert not rewrite(parse(text), DequantizeFloat8())
