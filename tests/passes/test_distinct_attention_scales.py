# SPDX-License-Identifier: Apache-2.0
"""Attentions of one query get scales of their own and give what they gave, to the bit."""

from __future__ import annotations

import numpy as np
import pytest

from freewheel.passes import DistinctAttentionScales

SHARED = """
g (float[b, 2, t, 16] q, float[b, 2, s, 16] k, float[b, 2, s, 16] v,
   float[b, 2, i, 16] k2, float[b, 2, i, 16] v2)
=> (float[b, 2, t, 16] text, float[b, 2, t, 16] image, float[b, 2, t, 16] third) {
    text = Attention(q, k, v)
    image = Attention(q, k2, v2)
    third = Attention<scale = 0.25>(q, k2, v)
}
"""


def scales(model) -> list[float | None]:
    return [n.attributes.get_float("scale") for n in model.graph if n.op_type == "Attention"]


def test_scores_stay_what_they_were(parse, rewrite, evaluate) -> None:
    random = np.random.default_rng(0)
    sizes = {"q": 5, "k": 4, "v": 4, "k2": 4, "v2": 4}
    feeds = {
        n: random.standard_normal((1, 2, size, 16)).astype(np.float32) for n, size in sizes.items()
    }
    model = parse(SHARED)
    expected = evaluate(model, feeds)
    assert rewrite(model, DistinctAttentionScales())
    # 1/sqrt(16) is 0.25, which the third asks for by name.
    assert scales(model) == [None, 0.125, 0.0625]
    assert [n.op_type for n in model.graph].count("Mul") == 2
    for name, found in evaluate(model, feeds).items():
        np.testing.assert_allclose(found, expected[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "text",
    [
        SHARED.replace("Attention(q, k2, v2)", "Attention<scale = 0.5>(q, k2, v2)").replace(
            "scale = 0.25", "scale = 0.125"
        ),
        "g (float[b, 2, t, 16] x, float[b, 2, t, 16] y) => (float[b, 2, t, 16] z) {"
        " a = Attention(x, y, y)  z = Attention(a, y, y) }",
        "g (float[n] x) => (float[n] y) { y = Neg(x) }",
    ],
    ids=["scales differ", "queries differ", "no attention"],
)
def test_others_are_left_alone(parse, rewrite, text: str) -> None:
    assert not rewrite(parse(text), DistinctAttentionScales())
