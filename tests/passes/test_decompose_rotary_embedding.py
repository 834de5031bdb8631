# SPDX-License-Identifier: Apache-2.0
"""RotaryEmbedding written out computes what the operator does."""

from __future__ import annotations

import numpy as np
import pytest

from freewheel.core.errors import PassError
from freewheel.passes import DecomposeRotaryEmbedding, run_passes

ROTARY = """
g (float[batch, 2, tokens, 6] x, float[batch, tokens, 3] c, float[batch, tokens, 3] s)
=> (float[batch, 2, tokens, 6] y) <float[batch, 2, tokens, 6] r> {
    r = RotaryEmbedding<interleaved = 1>(x, c, s)
    y = Neg(r)
}
"""


def feeds(batch: int, tokens: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(batch * 100 + tokens)
    angles = random.uniform(-9, 9, (batch, tokens, 3))
    return {
        "x": random.standard_normal((batch, 2, tokens, 6)).astype(np.float32),
        "c": np.cos(angles).astype(np.float32),
        "s": np.sin(angles).astype(np.float32),
    }


HALVES = ROTARY.replace("<interleaved = 1>", "")


@pytest.mark.parametrize("text", [ROTARY, HALVES], ids=["neighbours", "halves"])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (2, 5), (3, 8)])
def test_the_written_out_form_equals_the_operator(
    parse, rewrite, evaluate, batch, tokens, text
) -> None:
    model = parse(text)
    values = feeds(batch, tokens)
    expected = evaluate(model, values)["y"]
    assert rewrite(model, DecomposeRotaryEmbedding())
    assert "RotaryEmbedding" not in [n.op_type for n in model.graph]
    # One multiplication and one addition in float32 on both sides.
    np.testing.assert_allclose(evaluate(model, values)["y"], expected, rtol=1e-6, atol=1e-6)


def test_each_pair_is_rotated_by_its_angle(parse, rewrite, evaluate) -> None:
    model = parse(ROTARY)
    values = feeds(2, 4)
    rewrite(model, DecomposeRotaryEmbedding())
    pairs = values["x"][..., 0::2] + 1j * values["x"][..., 1::2]
    turned = pairs * (values["c"] + 1j * values["s"])[:, None]
    expected = np.stack([turned.real, turned.imag], axis=-1).reshape(values["x"].shape)
    np.testing.assert_allclose(evaluate(model, values)["y"], -expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("size", "group"), [(128, 128), (130, 26), (512, 128)])
def test_a_wide_vector_is_turned_in_groups(parse, rewrite, evaluate, size, group) -> None:
    model = parse(ROTARY.replace("tokens, 6]", f"tokens, {size}]").replace("3]", f"{size // 2}]"))
    random = np.random.default_rng(size)
    x = random.standard_normal((2, 2, 3, size)).astype(np.float32)
    angles = random.uniform(-9, 9, (2, 3, size // 2)).astype(np.float32)
    values = {"x": x, "c": np.cos(angles), "s": np.sin(angles)}
    expected = evaluate(model, values)["y"]
    assert rewrite(model, DecomposeRotaryEmbedding())
    matrices = [
        list(v.shape) for v in model.graph.initializers.values() if v.dtype.is_floating_point()
    ]
    assert sorted(matrices) == [[group // 2, group], [group, group]]
    np.testing.assert_allclose(evaluate(model, values)["y"], expected, rtol=1e-6, atol=1e-6)


def test_several_nodes_and_a_graph_output_are_replaced(parse, rewrite, evaluate) -> None:
    model = parse(
        "g (float[b, 2, t, 6] x, float[b, t, 3] c, float[b, t, 3] s)"
        "=> (float[b, 2, t, 6] y, float[b, 2, t, 6] z) {"
        " y = RotaryEmbedding<interleaved = 1>(x, c, s)"
        " h = Neg(s)  z = RotaryEmbedding<interleaved = 1>(x, c, h) }"
    )
    values = feeds(2, 3)
    expected = evaluate(model, values)
    assert rewrite(model, DecomposeRotaryEmbedding())
    assert [v.name for v in model.graph.outputs] == ["y", "z"]
    found = evaluate(model, values)
    for name in ("y", "z"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-6, atol=1e-6)


def test_a_graph_without_the_operator_is_left_alone(parse, rewrite) -> None:
    model = parse("g (float[n] x) => (float[n] y) { y = Cos(x) }")
    assert not rewrite(model, DecomposeRotaryEmbedding())


@pytest.mark.parametrize(
    "text",
    [
        ROTARY.replace("batch, 2, tokens, 6] x", "batch, 2, tokens, size] x"),
        "g (float[b, 2, t, 6] x, float[9, 3] c, float[9, 3] s, int64[b, t] p)"
        "=> (float[b, 2, t, 6] y) { y = RotaryEmbedding<interleaved = 1>(x, c, s, p) }",
    ],
    ids=["head size unknown", "position ids"],
)
def test_other_forms_are_refused_and_told_what_is_taken(parse, text) -> None:
    with pytest.raises(PassError) as caught:
        run_passes(parse(text), [DecomposeRotaryEmbedding()])
    assert caught.value.where.startswith("graph 'g', node ")
    assert "RotaryEmbedding" in caught.value.what
    assert "without position ids" in caught.value.hint
