# SPDX-License-Identifier: Apache-2.0
"""A kept engine is given to the same graph for the same target, whole, and to no other."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import onnx
import onnx.parser
import pytest

from freewheel.compiler.engine_store import EngineStore
from freewheel.engines import Target
from freewheel.engines.tensorrt import TensorRTRTX

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
pytestmark = pytest.mark.tensorrt

TARGET = Target("float32", {"x": ((1, 4), (2, 4), (3, 4))}, ("8.9",))
TEXT = '<ir_version: 10, opset_import: ["": 23]> g (float[n, 4] x) => (float[n, 4] y) { y = OP(x) }'


def graph(folder: Path, operator: str = "Neg") -> Path:
    path = folder / f"{operator}.onnx"
    onnx.save(onnx.parser.parse_model(TEXT.replace("OP", operator)), path)
    return path


@pytest.fixture
def store(tmp_path: Path) -> EngineStore:
    """A store with the engine of ``Neg``, which is also at ``first``."""
    made = EngineStore(TensorRTRTX(), tmp_path / "cache")
    path = graph(tmp_path)
    assert not made.take(path, TARGET, tmp_path / "first")
    TensorRTRTX().compile(path, TARGET, tmp_path / "first")
    made.keep(path, TARGET, tmp_path / "first")
    return made


def test_an_equal_graph_gets_the_same_files(store: EngineStore, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    assert store.take(graph(tmp_path / "elsewhere"), TARGET, tmp_path / "second")
    for name in ("model.plan", "engine.json"):
        assert (tmp_path / "second" / name).samefile(tmp_path / "first" / name)


def test_another_graph_or_target_gets_none(store: EngineStore, tmp_path: Path) -> None:
    path = graph(tmp_path)
    others = [
        replace(TARGET, compute_capabilities=("8.9", "12.0")),
        replace(TARGET, profiles={"x": ((1, 4), (2, 4), (4, 4))}),
        replace(TARGET, options={"max_aux_streams": 0}),
        replace(TARGET, precision="float16"),
    ]
    assert not any(store.take(path, other, tmp_path / "second") for other in others)
    assert not store.take(graph(tmp_path, "Abs"), TARGET, tmp_path / "second")
    assert not (tmp_path / "second").exists()


def test_a_damaged_engine_is_not_given(store: EngineStore, tmp_path: Path) -> None:
    (plan,) = (tmp_path / "cache").rglob("model.plan")
    content = plan.read_bytes()
    plan.unlink()
    plan.write_bytes(content[:100])
    assert not store.take(graph(tmp_path), TARGET, tmp_path / "second")
    store.keep(graph(tmp_path), TARGET, tmp_path / "first")
    assert store.take(graph(tmp_path), TARGET, tmp_path / "second")


def test_where_links_are_impossible_files_are_copied(
    store: EngineStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    assert store.take(graph(tmp_path), TARGET, tmp_path / "second")
    copied, first = tmp_path / "second" / "model.plan", tmp_path / "first" / "model.plan"
    assert copied.read_bytes() == first.read_bytes()
    assert not copied.samefile(first)


def test_engines_with_weights_inside_are_not_kept(store: EngineStore, tmp_path: Path) -> None:
    model = onnx.load(graph(tmp_path, "Abs"))
    tensor = model.graph.initializer.add()
    tensor.name, tensor.data_type = "w", onnx.TensorProto.FLOAT
    tensor.data_location = onnx.TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "weights.bin"
    onnx.save(model, tmp_path / "baked.onnx")
    store.keep(tmp_path / "baked.onnx", TARGET, tmp_path / "first")
    assert not store.take(tmp_path / "baked.onnx", TARGET, tmp_path / "second")
    assert len(list((tmp_path / "cache").rglob("model.plan"))) == 1
