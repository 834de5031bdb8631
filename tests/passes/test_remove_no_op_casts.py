# SPDX-License-Identifier: Apache-2.0
"""Only casts that change nothing go, and graph outputs keep their names."""

from __future__ import annotations

import numpy as np
import pytest

from freewheel.passes import RemoveNoOpCasts

X = np.array([[1.25, -3e-5, 70001.0]], dtype=np.float32)


def test_casts_to_the_same_dtype_go(parse, rewrite, evaluate) -> None:
    model = parse(
        "g (float[n, 3] x) => (float[n, 3] y) <float[n, 3] a, float[n, 3] b, float[n, 3] c>"
        "{ a = Cast<to = 1>(x)  b = Cast<to = 1>(a)  c = Neg(b)  y = Add(c, a) }"
    )
    expected = evaluate(model, {"x": X})["y"]
    assert rewrite(model, RemoveNoOpCasts())
    assert [n.op_type for n in model.graph] == ["Neg", "Add"]
    np.testing.assert_array_equal(evaluate(model, {"x": X})["y"], expected)


@pytest.mark.parametrize(("dtype", "number"), [("bfloat16", 16), ("float16", 10), ("int64", 7)])
def test_casts_that_round_stay(parse, rewrite, dtype, number) -> None:
    model = parse(
        f"g (float[n, 3] x) => (float[n, 3] y) <{dtype}[n, 3] a>"
        f"{{ a = Cast<to = {number}>(x)  y = Cast<to = 1>(a) }}"
    )
    assert not rewrite(model, RemoveNoOpCasts())
    assert [n.op_type for n in model.graph] == ["Cast", "Cast"]


def test_a_cast_of_unknown_input_dtype_stays(parse, rewrite) -> None:
    model = parse(
        "g (float[n, 3] x) => (float[n, 3] y) <float[n, 3] b>"
        "{ a = Neg(x)  b = Cast<to = 1>(a)  y = Neg(b) }"
    )
    assert not rewrite(model, RemoveNoOpCasts())


def test_a_cast_that_names_a_graph_output_stays(parse, rewrite, evaluate) -> None:
    model = parse(
        "g (float[n, 3] x) => (float[n, 3] kept, float[n, 3] y)"
        "{ kept = Cast<to = 1>(x)  y = Neg(kept) }"
    )
    assert not rewrite(model, RemoveNoOpCasts())
    assert [v.name for v in model.graph.outputs] == ["kept", "y"]
    np.testing.assert_array_equal(evaluate(model, {"x": X})["kept"], X)


def test_a_graph_output_below_a_no_op_cast_keeps_its_name(parse, rewrite, evaluate) -> None:
    model = parse(
        "g (float[n, 3] x) => (float[n, 3] y) <float[n, 3] a>{ a = Cast<to = 1>(x)  y = Neg(a) }"
    )
    assert rewrite(model, RemoveNoOpCasts())
    np.testing.assert_array_equal(evaluate(model, {"x": X})["y"], -X)
