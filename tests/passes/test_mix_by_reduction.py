# SPDX-License-Identifier: Apache-2.0
"""A weighted sum of rows is the product that it replaces."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from freewheel.bundle.reader import Bundle
from freewheel.passes import MixByReduction

PRODUCT = """
g (float[slots] mix, float[slots, m] history) => (float[1, m] y) <float[1, slots] row> {
    first = Constant<value = int64[1] {0}>()
    row = Unsqueeze(mix, first)
    y = MatMul(row, history)
}
"""


@pytest.mark.parametrize(("slots", "size"), [(1, 1), (5, 7)])
def test_it_mixes_as_the_product_does(parse, rewrite, evaluate, slots: int, size: int) -> None:
    random = np.random.default_rng(slots)
    feeds = {
        "mix": random.standard_normal(slots).astype(np.float32),
        "history": random.standard_normal((slots, size)).astype(np.float32),
    }
    model = parse(PRODUCT)
    assert rewrite(model, MixByReduction())
    assert "MatMul" not in {n.op_type for n in model.graph}
    expected = feeds["mix"][None] @ feeds["history"]
    np.testing.assert_allclose(evaluate(model, feeds)["y"], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "text",
    [
        "g (float[1, 4] x, float[4, 3] w) => (float[1, 3] y) { y = MatMul(x, w) }",
        "g (float[n, k] x, float[k, 3] w) => (float[n, 3] y) { y = MatMul(x, w) }",
        "g (float[b, 1, k] x, float[b, k, 3] w) => (float[b, 1, 3] y) { y = MatMul(x, w) }",
    ],
    ids=["a layer of one token", "many rows", "a batch"],
)
def test_other_products_stay(parse, rewrite, text: str) -> None:
    assert not rewrite(parse(text), MixByReduction())


def test_it_finds_the_product_of_reuse_and_no_other(tiny_bundle: Bundle, rewrite) -> None:
    found = [
        name
        for name in tiny_bundle.manifest.graphs
        if MixByReduction().run(ir.load(tiny_bundle.graph_path(name))).changed
    ]
    assert found == ["reuse"]
