# SPDX-License-Identifier: Apache-2.0
"""A graph's inputs and outputs are what was declared."""

from __future__ import annotations

import numpy as np
import pytest

from freewheel.core.errors import PassError
from freewheel.core.tensor_spec import TensorSpec
from freewheel.passes import DeclareInterface, run_passes

TWO_OUTPUTS = """
g (float[s26, s81, 4] x, float[4] weight) => (float[s26, s81, 4] y, float[s81, 4] tapped)
<int64[1] axis = {0}> {
    h = Mul(x, weight)
    y = Neg(h)
    t = Abs(h)
    tapped = ReduceMean<keepdims = 0>(t, axis)
}
"""

INPUTS = {"x": TensorSpec("float32", ("batch", "tokens", 4))}
Y = {"y": TensorSpec("float32", ("batch", "tokens", 4))}
TAPPED = {"tapped": TensorSpec("float32", ("tokens", 4))}


def shapes(values) -> dict[str, list[str]]:
    return {v.name: [str(d) for d in v.shape] for v in values}


def test_dimensions_get_their_declared_names_and_values_stay(parse, rewrite, evaluate) -> None:
    model = parse(TWO_OUTPUTS)
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    feeds = {"x": x, "weight": np.array([1, -2, 3, 0.5], dtype=np.float32)}
    expected = evaluate(model, feeds)
    assert rewrite(model, DeclareInterface(INPUTS, {**Y, **TAPPED}))
    assert shapes(model.graph.inputs) == {"x": ["batch", "tokens", "4"], "weight": ["4"]}
    assert shapes(model.graph.outputs) == {"y": ["batch", "tokens", "4"], "tapped": ["tokens", "4"]}
    found = evaluate(model, feeds)
    for name in ("y", "tapped"):
        np.testing.assert_array_equal(found[name], expected[name])


def test_outputs_not_declared_go_with_what_only_they_need(parse, rewrite) -> None:
    model = parse(TWO_OUTPUTS)
    assert rewrite(model, DeclareInterface(INPUTS, Y))
    assert [v.name for v in model.graph.outputs] == ["y"]
    assert [n.op_type for n in model.graph] == ["Mul", "Neg"]
    assert [v.name for v in model.graph.inputs] == ["x", "weight"], "unused inputs are kept"


def test_a_graph_that_is_as_declared_is_left_alone(parse, rewrite) -> None:
    model = parse("g (float[batch, tokens, 4] x) => (float[batch, tokens, 4] y) { y = Neg(x) }")
    assert not rewrite(model, DeclareInterface(INPUTS, Y))


def test_a_missing_output_is_named_beside_those_found(parse) -> None:
    model = parse("g (float[n] x) => (float[n] other) { other = Neg(x) }")
    with pytest.raises(PassError) as caught:
        run_passes(model, [DeclareInterface({}, Y)])
    assert caught.value.where == "graph output 'y'"
    assert "['other']" in caught.value.what


@pytest.mark.parametrize(
    ("found", "spelled"), [("float16", "float16"), ("bfloat16", "bfloat16"), ("double", "float64")]
)
def test_an_output_of_another_dtype_is_refused(parse, found, spelled) -> None:
    model = parse(
        f"g ({found}[batch, tokens, 4] x) => ({found}[batch, tokens, 4] y) {{ y = Neg(x) }}"
    )
    with pytest.raises(PassError) as caught:
        run_passes(model, [DeclareInterface({}, Y)])
    assert caught.value.where == "graph output 'y'"
    assert caught.value.what == f"is {spelled}, declared float32"
