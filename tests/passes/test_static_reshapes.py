# SPDX-License-Identifier: Apache-2.0
"""Shape arithmetic in front of Reshape becomes a constant, where a constant can say it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from freewheel.passes import StaticReshapes

# [batch, tokens, 6] → [batch, tokens, 2, 3], as the exporter spells `unflatten`.
SPLIT_HEADS = """
g (float[batch, tokens, 6] x) => (float[batch, tokens, 2, 3] y)
<int64[1] two = {2}, int64[1] three = {3}, float[batch, tokens, 2, 3] h> {
    batch_size = Shape<start = 0, end = 1>(x)
    token_count = Shape<start = 1, end = 2>(x)
    target = Concat<axis = 0>(batch_size, token_count, two, three)
    h = Reshape<allowzero = 1>(x, target)
    y = Neg(h)
}
"""

# [batch, 4, frames, height] → [batch, 4, tokens]: one dimension is derived.
FLATTEN = """
g (float[batch, 4, frames, height] x) => (float[batch, 4, tokens] y)
<int64[1] four = {4}, int64[1] rest = {-1}, float[batch, 4, tokens] h> {
    batch_size = Shape<start = 0, end = 1>(x)
    target = Concat<axis = 0>(batch_size, four, rest)
    h = Reshape(x, target)
    y = Neg(h)
}
"""


@pytest.mark.parametrize(
    ("text", "feed", "target"),
    [
        (SPLIT_HEADS, (2, 5, 6), [0, 0, 2, 3]),
        (FLATTEN, (3, 4, 2, 7), [0, 4, -1]),
    ],
)
def test_the_target_becomes_constant_and_shape_arithmetic_goes(
    parse, rewrite, evaluate, text, feed, target
) -> None:
    model = parse(text)
    x = np.random.default_rng(0).standard_normal(feed).astype(np.float32)
    expected = evaluate(model, {"x": x})["y"]
    assert rewrite(model, StaticReshapes())
    assert [n.op_type for n in model.graph] == ["Reshape", "Neg"]
    reshape = next(iter(model.graph))
    constant = ir.convenience.get_const_tensor(reshape.inputs[1])
    assert constant is not None
    assert constant.numpy().tolist() == target
    assert "allowzero" not in reshape.attributes, "0 has to mean copy"
    np.testing.assert_array_equal(evaluate(model, {"x": x})["y"], expected)


def test_two_unknown_dimensions_keep_their_arithmetic(parse, rewrite) -> None:
    model = parse(
        "g (float[tokens, 6] x, int64[3] target) => (float[frames, rows, 6] y)"
        "{ y = Reshape(x, target) }"
    )
    assert not rewrite(model, StaticReshapes())


def test_a_dimension_that_moved_is_inferred_and_not_copied(parse, rewrite, evaluate) -> None:
    model = parse(
        "g (float[batch, tokens] x, int64[2] target) => (float[1, batch_tokens] y)"
        "<float[1, batch_tokens] h> { h = Reshape(x, target)  y = Neg(h) }"
    )
    assert rewrite(model, StaticReshapes())
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    feeds = {"x": x, "target": np.array([1, 6])}
    np.testing.assert_array_equal(evaluate(model, feeds)["y"], -x.reshape(1, 6))


def test_equal_names_at_another_place_are_two_unknowns(parse, rewrite) -> None:
    model = parse(
        "g (float[a, b] x, int64[2] target) => (float[b, a] y) { y = Reshape(x, target) }"
    )
    assert not rewrite(model, StaticReshapes())


@pytest.mark.parametrize(
    "text",
    [
        "g (float[a, 6] x) => (float[a, 2, 3] y) <int64[3] t = {0, 2, 3}> { y = Reshape(x, t) }",
        "g (float[a, 0] x, int64[2] t) => (float[a, 0] y) { y = Reshape(x, t) }",
        "g (float[a, 6] x, int64[3] t) => (float[a, 2, 3] y) { h = Reshape(x, t)  y = Neg(h) }",
    ],
    ids=["already constant", "empty dimension", "shape unknown"],
)
def test_what_cannot_or_need_not_be_written_is_left_alone(parse, rewrite, text) -> None:
    assert not rewrite(parse(text), StaticReshapes())
