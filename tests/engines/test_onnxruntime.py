# SPDX-License-Identifier: Apache-2.0

import json

import pytest

from freewheel.core.errors import BackendUnavailable, BuildError
from freewheel.engines import Target
from freewheel.engines.onnxruntime import OnnxRuntime


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_only_float32_is_compiled(graph, precision):
    with pytest.raises(BuildError) as caught:
        OnnxRuntime().compile(graph("matmul"), Target(precision=precision), graph("matmul"))
    assert "matmul.onnx" in caught.value.where
    assert precision in caught.value.what
    assert "--precision float32" in caught.value.hint


def test_a_node_without_a_kernel_is_named(graph):
    path = graph("matmul_bf16")
    with pytest.raises(BuildError, match="MatMul"):
        OnnxRuntime().compile(path, Target(), path.parent / "engine")


def test_baked_weights_are_shared_with_the_bundle(baked):
    path, _ = baked
    OnnxRuntime().compile(path, Target(), path.parent.parent / "engine")
    stored = path.parent.parent / "engine" / "weights.bin"
    assert stored.samefile(path.parent / "weights.bin")


def test_an_engine_runs_on_other_machines_and_versions(graph):
    path = graph("matmul")
    folder = path.parent / "engine"
    OnnxRuntime().compile(path, Target(), folder)
    record = json.loads((folder / "engine.json").read_text())
    assert record["machine"] == ""
    record["version"] = "0.0.1"
    (folder / "engine.json").write_text(json.dumps(record))
    assert set(OnnxRuntime().load(folder).inputs) == {"x", "w"}


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch, graph):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert OnnxRuntime.probe().install == "pip install onnxruntime"
    with pytest.raises(BackendUnavailable, match="pip install onnxruntime"):
        OnnxRuntime().load(graph("matmul").parent)


def test_probe_names_version_and_precision():
    found = OnnxRuntime.probe()
    assert found.available
    assert "float32" in found.reason
