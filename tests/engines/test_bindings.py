# SPDX-License-Identifier: Apache-2.0

import onnx.parser
import pytest

from freewheel.core.errors import BuildError
from freewheel.engines import TensorSpec
from freewheel.engines.bindings import load_graph, specs_of


def parsed(text):
    return onnx.parser.parse_model('<ir_version: 10, opset_import: ["": 23]>' + text).graph


def test_weights_inside_the_graph_are_no_inputs():
    graph = parsed(
        "g (float[n, 2] x, float[2] w) => (float[n, 2] y) <float[2] w = {1., 2.}>{ y = Mul(x, w) }"
    )
    inputs, outputs = specs_of(graph, "g")
    assert inputs == {"x": TensorSpec("float32", ("n", 2))}
    assert outputs == {"y": TensorSpec("float32", ("n", 2))}


def test_nameless_dimensions_get_a_name_of_their_own():
    inputs, _ = specs_of(
        parsed("g (float[?, 2] x, float[?, 2] z) => (float[?, 2] y){ y = Add(x, z) }"), "g"
    )
    assert inputs["x"].shape == ("x.0", 2)
    assert inputs["z"].shape == ("z.0", 2)


def test_dtypes_that_engines_do_not_pass_are_refused():
    with pytest.raises(BuildError) as caught:
        specs_of(parsed("g (double[2] x) => (double[2] y) { y = Neg(x) }"), "here.onnx")
    assert caught.value.where == "here.onnx, tensor 'x'"
    assert "DOUBLE" in caught.value.what
    assert "cast" in caught.value.hint


def test_external_weights_are_not_read(baked):
    path, _ = baked
    (path.parent / "weights.bin").unlink()
    assert load_graph(path).graph.initializer[0].name == "w"
