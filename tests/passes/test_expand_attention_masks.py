# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime takes a broadcast mask after the pass, and means by it what ONNX does."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from freewheel.passes import ExpandAttentionMasks, MultiHeadAttention

MASKED = """
g (float[b, 3, s, 8] q, float[b, 3, t, 8] k, float[b, 3, t, 8] v, KIND[b, 1, 1, t] m)
=> (float[b, 3, s, 8] y) {
    y = Attention(q, k, v, m)
}
"""


@pytest.mark.parametrize("kind", ["float", "bool"])
@pytest.mark.parametrize(("batch", "queries", "keys"), [(1, 1, 5), (2, 6, 4)])
def test_masked_keys_count_as_the_mask_says(parse, rewrite, kind, batch, queries, keys) -> None:
    random = np.random.default_rng(queries)
    shapes = {"q": queries, "k": keys, "v": keys}
    values = {
        n: random.standard_normal((batch, 3, s, 8)).astype(np.float32) for n, s in shapes.items()
    }
    kept = random.random((batch, 1, 1, keys)) < 0.7
    kept[..., 0] = True
    bias = np.where(kept, 0, -1e9).astype(np.float32)
    scores = values["q"] @ values["k"].swapaxes(-1, -2) * 8**-0.5 + bias
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = (weights / weights.sum(-1, keepdims=True)) @ values["v"]
    model = parse(MASKED.replace("KIND", kind))
    assert rewrite(model, ExpandAttentionMasks())
    content = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    found = session.run(None, {**values, "m": kept if kind == "bool" else bias})[0]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mask", ["float[b, 1, s, t]", "float[s, t]"])
def test_a_mask_with_a_row_per_query_stays(parse, rewrite, mask) -> None:
    assert not rewrite(parse(MASKED.replace("KIND[b, 1, 1, t]", mask)), ExpandAttentionMasks())


def test_attention_without_a_mask_stays(parse, rewrite) -> None:
    model = parse(MASKED.replace("(q, k, v, m)", "(q, k, v)").replace("KIND", "float"))
    assert not rewrite(model, ExpandAttentionMasks())


def test_a_masked_attention_is_not_made_the_contributed_operator(parse, rewrite) -> None:
    assert not rewrite(parse(MASKED.replace("KIND", "float")), MultiHeadAttention())
