# SPDX-License-Identifier: Apache-2.0
"""A graph is compiled after its backend's passes, for its target, once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import onnx
import onnx.parser
import pytest
from recorder import OpenVinoRecorder, Recorder

from freewheel.bundle.reader import Bundle
from freewheel.bundle.store import Store
from freewheel.compiler.engines import compile_graph, target_label
from freewheel.engines import Target


def test_each_graph_is_compiled_in_its_own_precision_after_its_backends_passes(
    tiny_bundle: Bundle, tmp_path: Path
) -> None:
    graph = tmp_path / "block.onnx"
    for backend, name, present, absent in (
        (Recorder(), "block.onnxruntime.onnx", "RotaryEmbedding", "Attention"),
        (OpenVinoRecorder(), "block.openvino.onnx", "Attention", "RotaryEmbedding"),
    ):
        shutil.copyfile(tiny_bundle.graph_path("block"), graph)
        compile_graph(backend, graph, Target(precision="bfloat16"), tmp_path / "engine")
        compiled, precision, operators = json.loads((tmp_path / "engine").read_text())
        assert (compiled, precision) == (name, "bfloat16")
        assert present in operators
        assert absent not in operators
        assert (tmp_path / name).is_file(), "runtimes without our passes compile it again"


def test_graphs_that_no_pass_changes_are_compiled_as_they_are(
    tiny_bundle: Bundle, tmp_path: Path
) -> None:
    graph = Path(shutil.copyfile(tiny_bundle.graph_path("head"), tmp_path / "head.onnx"))
    compile_graph(OpenVinoRecorder(), graph, Target(), tmp_path / "engine")
    assert json.loads((tmp_path / "engine").read_text())[0] == "head.onnx"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["engine", "head.onnx"]


def test_targets_are_named_by_capability_or_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert target_label(Target(compute_capabilities=("8.9", "12.0"))) == "sm89-120"
    monkeypatch.setattr("platform.machine", lambda: "AMD64")
    assert target_label(Target()) == "amd64"


def test_an_equal_graph_is_compiled_once_for_equal_targets(
    tiny_bundle: Bundle, tmp_path: Path
) -> None:
    backend, store = Recorder(), Store(tmp_path / "store")
    head, block = (tiny_bundle.graph_path(n) for n in ("head", "finish"))
    compile_graph(backend, head, Target(), tmp_path / "a", store)
    compile_graph(backend, head, Target(), tmp_path / "b", store)
    assert backend.compiled == ["head.onnx"]
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    for number, (graph, target, other) in enumerate(
        [
            (block, Target(), backend),
            (head, Target(compute_capabilities=("8.9",)), backend),
            (head, Target(options={"max_aux_streams": 0}), backend),
            (head, Target(profiles={"latents": ((1,), (2,), (3,))}), backend),
            (head, Target(precision="float16"), backend),
            (head, Target(), OpenVinoRecorder()),
            (head, Target(), Recorder("nothing")),
        ]
    ):
        before = len(other.compiled)
        compile_graph(other, graph, target, tmp_path / f"other-{number}", store)
        assert len(other.compiled) == before + 1, (graph, target)


def test_engines_with_weights_inside_are_not_kept(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 23]> g (float[n] x) => (float[n] y) { y = Neg(x) }'
    )
    tensor = model.graph.initializer.add()
    tensor.name, tensor.data_type = "w", onnx.TensorProto.FLOAT
    tensor.data_location = onnx.TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "weights.bin"
    entry = tensor.external_data.add()
    entry.key, entry.value = "length", "4"
    tensor.dims.append(1)
    (tmp_path / "weights.bin").write_bytes(bytes(4))
    onnx.save(model, tmp_path / "baked.onnx")
    backend, store = Recorder(), Store(tmp_path / "store")
    for name in "ab":
        compile_graph(backend, tmp_path / "baked.onnx", Target(), tmp_path / name, store)
    assert backend.compiled == ["baked.onnx"] * 2
    assert not (tmp_path / "store").exists()
