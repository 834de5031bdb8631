# SPDX-License-Identifier: Apache-2.0
"""What the exporter recorded about machine and source is gone, wherever it stood."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from freewheel.passes import StripTraceMetadata

BRANCHES = """
g (bool late, float[2] x) => (float[2] y) {
    y = If (late) <
        then_branch = then_g () => (float[2] a) {
            a = If (late) <
                then_branch = inner_g () => (float[2] c) { c = Add(x, x) },
                else_branch = other_g () => (float[2] d) { d = Abs(x) }
            >
        },
        else_branch = else_g () => (float[2] b) { b = Mul(x, x) }
    >
}
"""

SECRET = "/home/somebody/project/model.py"


def test_metadata_of_model_graph_nodes_and_values_is_cleared(parse, rewrite, evaluate) -> None:
    model = parse(
        "g (float[2] x) => (float[2] y) <float[2] w = {1, 2}> { h = Mul(x, w) y = Neg(h) }"
    )
    carriers = [model, model.graph, *model.graph, *model.graph.inputs]
    carriers += [*model.graph.initializers.values(), *(v for n in model.graph for v in n.outputs)]
    assert len(carriers) == 8
    for carrier in carriers:
        carrier.metadata_props["pkg.torch.onnx.stack_trace"] = SECRET
        carrier.doc_string = SECRET
    x = np.array([3, -1], dtype=np.float32)
    expected = evaluate(model, {"x": x})["y"]
    assert rewrite(model, StripTraceMetadata())
    assert SECRET.encode() not in ir.to_proto(model).SerializeToString()
    np.testing.assert_array_equal(evaluate(model, {"x": x})["y"], expected)


def test_metadata_inside_branches_is_cleared(parse, rewrite) -> None:
    model = parse(BRANCHES)
    nodes = list(model.graph.all_nodes())
    assert [n.op_type for n in nodes] == ["If", "If", "Add", "Abs", "Mul"]
    for node in nodes[1:]:
        node.graph.doc_string = SECRET
        node.metadata_props["pkg.torch.onnx.stack_trace"] = SECRET
        node.outputs[0].metadata_props["pkg.torch.onnx.original_node_name"] = SECRET
    model.graph.doc_string = None
    assert rewrite(model, StripTraceMetadata())
    assert SECRET.encode() not in ir.to_proto(model).SerializeToString()


def test_a_clean_graph_is_left_alone(parse, rewrite) -> None:
    assert not rewrite(parse(BRANCHES), StripTraceMetadata())


def test_graphs_traced_in_different_places_end_up_equal(parse) -> None:
    found = set()
    for place in ("/home/a/x.py", "C:\\b\\x.py"):
        model = parse(BRANCHES)
        next(iter(model.graph)).doc_string = place
        StripTraceMetadata().run(model)
        found.add(ir.to_proto(model).SerializeToString(deterministic=True))
    assert len(found) == 1
