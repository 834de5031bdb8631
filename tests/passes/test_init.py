# SPDX-License-Identifier: Apache-2.0
"""The table of passes and the pipelines."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np

from freewheel.core.tensor_spec import TensorSpec
from freewheel.passes import PASSES, backend_pipeline, run_passes, template_pipeline

# A linear layer as the exporter leaves it: weights inside, symbols of its own, a cast for nothing.
TRACED = """
g (float[s0, s1, 4] x) => (float[s0, s1, 2, 2] y, float[s0, s1, 4] tapped)
<float[4, 4] weight = {1, 0, 0, 0, 0, 2, 0, 0, 0, 0, 3, 0, 0, 0, 0, 4},
 int64[2] halves = {2, 2}, float[4, 4] t, float[s0, s1, 4] tapped_too,
 float[s0, s1, 4] same, float[s0, s1, 2, 2] y> {
    t = Transpose<perm = [1, 0]>(weight)
    tapped = MatMul(x, t)
    same = Cast<to = 1>(tapped)
    sizes = Shape<start = 0, end = 2>(x)
    target = Concat<axis = 0>(sizes, halves)
    y = Reshape<allowzero = 1>(same, target)
}
"""


def test_every_pass_file_has_a_row(repository: Path) -> None:
    written = set()
    for path in (repository / "passes").glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and "Pass" in [ast.unparse(b) for b in node.bases]:
                written.add(node.name)
    assert {p.__name__ for p in PASSES} == written
    assert len(PASSES) == len(written)


def test_pipelines_hold_passes_of_the_table_in_its_order() -> None:
    for pipeline in (template_pipeline([], {}, {}), backend_pipeline("openvino")):
        assert {type(p) for p in pipeline} <= set(PASSES)


def test_the_template_pipeline_turns_a_traced_layer_into_a_template(parse, evaluate) -> None:
    x = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)
    expected = evaluate(parse(TRACED), {"x": x})["y"]
    inputs = {"x": TensorSpec("float32", ("batch", "tokens", 4))}
    outputs = {"y": TensorSpec("float32", ("batch", "tokens", 2, 2))}
    pipeline = template_pipeline(["weight"], inputs, outputs)
    model, changed = run_passes(parse(TRACED), pipeline)
    assert changed[0] == "WeightsAsInputs"
    assert [v.name for v in model.graph.inputs] == ["x", "weight"]
    assert [v.name for v in model.graph.outputs] == ["y"]
    assert [n.op_type for n in model.graph] == ["Transpose", "MatMul", "Reshape"]
    feeds = {"x": x, "weight": np.diag([1, 2, 3, 4]).astype(np.float32)}
    np.testing.assert_array_equal(evaluate(model, feeds)["y"], expected)
    _, again = run_passes(model, pipeline)
    assert again == []


def test_backends_have_passes_of_their_own() -> None:
    tensorrt = ["MixByReduction", "DistinctAttentionScales", "DequantizeFloat8", "SumRowsByProduct"]
    names = ("openvino", "onnxruntime", "tensorrt", "tensorrt-rtx")
    found = {n: [type(p).__name__ for p in backend_pipeline(n)] for n in names}
    assert found == {
        "openvino": ["DecomposeRotaryEmbedding", "KeepSumsBeforeProducts"],
        "onnxruntime": ["MultiHeadAttention", "ExpandAttentionMasks"],
        "tensorrt": tensorrt,
        "tensorrt-rtx": tensorrt,
    }
