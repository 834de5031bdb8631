# SPDX-License-Identifier: Apache-2.0
"""Traced templates hold no weights, keep their dimensions open and their precision islands."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor, nn

from freewheel.bundle.manifest import GraphEntry
from freewheel.compiler.cut.declared import Cut, Segment
from freewheel.compiler.graphs.export import BATCH_DIMS, OPSET, trace
from freewheel.core.errors import ExportError
from freewheel.core.tensor_spec import TensorSpec

F32, BF16 = TensorProto.FLOAT, TensorProto.BFLOAT16


class Graph:
    """An ONNX graph by value name: producers, consumers and dtypes."""

    def __init__(self, model: onnx.ModelProto) -> None:
        model = onnx.shape_inference.infer_shapes(model)
        self.proto = model.graph
        self.nodes = list(model.graph.node)
        self.producer = {o: n for n in self.nodes for o in n.output}
        self.dtype = {t.name: t.data_type for t in model.graph.initializer}
        for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
            self.dtype[value.name] = value.type.tensor_type.elem_type

    def of(self, *op_types: str) -> list[onnx.NodeProto]:
        return [n for n in self.nodes if n.op_type in op_types]

    def dtypes(self, node: onnx.NodeProto) -> set[int]:
        """Dtypes of what a node computes with: floating inputs and outputs."""
        names = [n for n in (*node.input, *node.output) if n]
        return {self.dtype[n] for n in names} & {F32, BF16, TensorProto.FLOAT16}

    def downstream(self, name: str, until: str) -> list[onnx.NodeProto]:
        """Nodes that ``name`` reaches without passing one of type ``until``."""
        reached, found = {name}, []
        for node in self.nodes:
            if reached & set(node.input):
                found.append(node)
                if node.op_type != until:
                    reached |= set(node.output)
        return found


@pytest.fixture(scope="module")
def graph(bfloat16_block: onnx.ModelProto) -> Graph:
    return Graph(bfloat16_block)


def test_a_template_traced_on_meta_holds_no_weights(
    bfloat16_graphs: tuple[Path, dict[str, GraphEntry]],
    bfloat16_block: onnx.ModelProto,
    bfloat16_cut: Cut,
) -> None:
    folder, _ = bfloat16_graphs
    block = next(s for s in bfloat16_cut.segments if s.name == "block")
    weight_bytes = sum(p.numel() * p.element_size() for p in block.module.parameters())
    assert weight_bytes > 20_000_000
    assert (folder / "graphs" / "block.onnx").stat().st_size < 50_000
    assert sorted(p.name for p in (folder / "graphs").iterdir()) == [
        "block.onnx",
        "block_tapped.onnx",
    ]
    for tensor in bfloat16_block.graph.initializer:
        assert tensor.data_location != TensorProto.EXTERNAL
        assert np.prod(tensor.dims, dtype=int) <= 1024, f"'{tensor.name}' is as large as a weight"


def test_norms_modulation_and_rotation_are_float32(graph: Graph) -> None:
    norms = graph.of("LayerNormalization", "RMSNormalization")
    assert len(norms) == 6
    for node in (*norms, *graph.of("RotaryEmbedding", "Split", "Mul")):
        assert graph.dtypes(node) == {F32}, (node.op_type, node.name)
    assert len(graph.of("RotaryEmbedding")) == 2


def test_everything_the_timestep_touches_before_a_product_is_float32(graph: Graph) -> None:
    touched = graph.downstream("timestep_proj", until="Cast")
    kinds = [n.op_type for n in touched if n.op_type != "Cast"]
    assert kinds.count("Mul") == 4, "two scales and two gates"
    assert kinds.count("Split") == 1
    for node in touched:
        if node.op_type == "Cast":
            assert graph.dtype[node.input[0]] == F32
        else:
            assert graph.dtypes(node) == {F32}, node.name


def test_products_and_attention_are_bfloat16(graph: Graph) -> None:
    products, attention = graph.of("MatMul", "Gemm"), graph.of("Attention")
    assert len(products) == 8, "q, k, v, out; q, out; up, down"
    assert len(attention) == 2, "attention is one fused node"
    for node in (*products, *attention, *graph.of("Gelu")):
        assert graph.dtypes(node) == {BF16}, (node.op_type, node.name)
    assert graph.of("Softmax") == []


def test_the_residual_stream_is_float32_from_end_to_end(graph: Graph) -> None:
    name, adds = "hidden_out", 0
    while name != "hidden":
        node = graph.producer[name]
        assert node.op_type == "Add", f"'{name}' is no residual sum but a {node.op_type}"
        assert graph.dtypes(node) == {F32}
        adds += 1
        stream = [n for n in node.input if n == "hidden" or _is_sum_of_stream(graph, n)]
        assert len(stream) == 1, node.name
        name = stream[0]
    assert adds == 3, "self-attention, cross-attention, feed-forward"


def _is_sum_of_stream(graph: Graph, name: str) -> bool:
    node = graph.producer.get(name)
    return node is not None and node.op_type == "Add" and graph.dtype[name] == F32


def test_gates_are_applied_in_float32_to_the_products(graph: Graph) -> None:
    split = graph.of("Split")[0]
    for index in (2, 5):
        users = [n for n in graph.nodes if split.output[index] in n.input]
        assert [n.op_type for n in users] == ["Mul"]
        (branch,) = [n for n in users[0].input if n != split.output[index]]
        assert graph.producer[branch].op_type == "Cast"
        assert graph.dtype[graph.producer[branch].input[0]] == BF16
        assert graph.dtype[branch] == F32


def test_only_products_and_what_lies_between_them_are_bfloat16(graph: Graph) -> None:
    low = {n.op_type for n in graph.nodes if BF16 in graph.dtypes(n)}
    low.discard("Shape")  # reads sizes only
    assert low == {"Cast", "MatMul", "Add", "Transpose", "Reshape", "Attention", "Gelu"}
    inputs = {v.name for v in graph.proto.input}
    for node in graph.of("Add"):
        if BF16 in graph.dtypes(node):
            assert any(n in inputs and n.endswith(".bias") for n in node.input), node.name


def test_no_example_size_is_left_in_the_graph(
    bfloat16_cut: Cut, bfloat16_block: onnx.ModelProto
) -> None:
    constants = {
        int(v)
        for t in bfloat16_block.graph.initializer
        if t.data_type == TensorProto.INT64
        for v in numpy_helper.to_array(t).flat
    }
    examples = {bfloat16_cut.example_dims["tokens"], BATCH_DIMS["text_tokens"]}
    assert not constants & examples
    assert BATCH_DIMS["batch"] not in constants
    for value in (*bfloat16_block.graph.value_info, *bfloat16_block.graph.output):
        sizes = {d.dim_value for d in value.type.tensor_type.shape.dim}
        assert not sizes & examples, value.name


def test_nothing_of_the_machine_is_left_in_the_graph(
    bfloat16_graphs: tuple[Path, dict[str, GraphEntry]], repository: Path
) -> None:
    for path in (bfloat16_graphs[0] / "graphs").iterdir():
        content = path.read_bytes()
        for trace_of in (str(repository), str(Path.home()), ".py", "site-packages", "Traceback"):
            assert trace_of.encode() not in content, trace_of


class Linear(nn.Module):
    def __init__(self, size: int = 4) -> None:
        super().__init__()
        with torch.device("meta"):
            self.layer = nn.Linear(size, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if bool(x.sum() > 0) else x - 1


class Mirrored(Linear):
    """Computes 1 - x, whose operator in torch has no translation of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return 1 - super().forward(x)


def linear_segment(module: nn.Module) -> Segment:
    return Segment(
        "linear",
        "step",
        module,
        {"x": TensorSpec("float32", ("batch", "tokens", 4))},
        {"y": TensorSpec("float32", ("batch", "tokens", 3))},
    )


def test_weights_come_out_as_initializers_without_data() -> None:
    model = trace(linear_segment(Linear()), {"tokens": 15})
    assert set(model.graph.initializers) == {"layer.weight", "layer.bias"}
    assert model.opset_imports[""] == OPSET
    assert [v.name for v in model.graph.inputs] == ["x"]
    assert [v.name for v in model.graph.outputs] == ["y"]


def test_equal_modules_give_equal_bytes() -> None:
    """Bundles of two fine-tunes share their graphs."""
    from freewheel.passes import run_passes, template_pipeline

    found = set()
    for _ in range(2):
        segment = linear_segment(Linear())
        pipeline = template_pipeline(
            ["layer.weight", "layer.bias"], segment.inputs, segment.outputs
        )
        model, _ = run_passes(trace(segment, {"tokens": 15}), pipeline)
        found.add(ir.to_proto(model).SerializeToString())
    assert len(found) == 1


def test_what_torch_cannot_export_is_told_by_segment() -> None:
    with pytest.raises(ExportError) as caught:
        trace(linear_segment(Branching()), {"tokens": 15})
    assert caught.value.where == "segment 'linear'"
    assert "torch could not export it" in caught.value.what
    assert caught.value.hint
    assert caught.value.__cause__ is not None


def test_tracing_leaves_torch_and_logging_as_they_were(capfd: pytest.CaptureFixture[str]) -> None:
    import logging

    from torch._export import utils
    from torch.fx import config
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    before = ONNXRegistry.__dict__["from_torchlib"].__func__
    lists, silent = utils._materialize_cpp_cia_ops, config.do_not_emit_stack_traces
    trace(linear_segment(Linear()), {"tokens": 15})
    with pytest.raises(ExportError):
        trace(linear_segment(Branching()), {"tokens": 15})
    after = ONNXRegistry.from_torchlib
    assert getattr(after, "__func__", after) is before
    assert utils._materialize_cpp_cia_ops is lists
    assert config.do_not_emit_stack_traces is silent
    assert logging.root.manager.disable == 0
    assert capfd.readouterr().out == ""


def test_torch_lists_its_operators_once_in_an_export(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._export import utils

    listed, lists = [], utils._materialize_cpp_cia_ops
    monkeypatch.setattr(utils, "_materialize_cpp_cia_ops", lambda: listed.append(1) or lists())
    trace(linear_segment(Mirrored()), {"tokens": 15})
    assert len(listed) == 1


@pytest.mark.parametrize(("module", "traced_again"), [(Linear, 0), (Mirrored, 1)])
def test_operators_that_onnx_has_are_not_traced_again(
    monkeypatch: pytest.MonkeyPatch, module: type[Linear], traced_again: int
) -> None:
    """Either way the graph computes what the module does."""
    again, decompose = [], torch.export.ExportedProgram.run_decompositions
    monkeypatch.setattr(
        torch.export.ExportedProgram,
        "run_decompositions",
        lambda *given: again.append(1) or decompose(*given),
    )
    model = trace(linear_segment(module()), {"tokens": 15})
    assert len(again) == traced_again
    real = module().to_empty(device="cpu")
    with torch.no_grad():
        real.layer.weight.copy_(torch.randn(3, 4))
        real.layer.bias.copy_(torch.randn(3))
    for name, value in real.state_dict().items():
        model.graph.initializers[name].const_value = ir.tensor(value.numpy(), name=name)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString())
    x = torch.randn(2, 7, 4)
    np.testing.assert_allclose(
        session.run(None, {"x": x.numpy()})[0], real(x).detach(), rtol=1e-5, atol=1e-6
    )
