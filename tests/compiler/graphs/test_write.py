# SPDX-License-Identifier: Apache-2.0
"""Graphs on disk are what their manifest entries say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch
from torch import nn

from freewheel.bundle.manifest import GraphEntry, StageEntry
from freewheel.bundle.reader import Bundle
from freewheel.bundle.store import Store
from freewheel.compiler.cut.declared import Cut, Segment
from freewheel.compiler.graphs import write as graphs
from freewheel.compiler.graphs.write import io_entries, wanted_weights, write_graphs
from freewheel.core.tensor_spec import TensorSpec
from freewheel.policies.solved import MAXIMUM_STEPS

TRACED = """
<ir_version: 10, opset_import: ["": 23]>
g (float[s0, 4] x, float[s0, 4] unread) => (float[s0, 4] y, float[s0, 4] tapped)
<float[4] scale = {1, 2, 3, 4}, float[4] unused = {0, 0, 0, 0}> {
    tapped = Mul(x, scale)
    y = Neg(tapped)
}
"""
X = TensorSpec("float32", ("tokens", 4))
OTHER = TensorSpec("float32", ("rows", 4))


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
        self.unused = nn.Parameter(torch.ones(4))


class Counter:
    """Progress that remembers."""

    def __init__(self) -> None:
        self.done: list[str] = []

    def phase(self, name: str, total: int) -> None:
        self.done.append(name)

    def advance(self, what: str, steps: int = 1) -> None:
        self.done.append(what)


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of segments traced, by a tracer that takes no time."""
    names: list[str] = []

    def fake(segment: Segment, example_dims: dict[str, int]) -> ir.Model:
        names.append(segment.name)
        return ir.from_onnx_text(TRACED)

    monkeypatch.setattr(graphs, "trace", fake)
    return names


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "graphs").mkdir()
    return tmp_path


def two_segments() -> list[Segment]:
    module = Scale()
    outputs = {"y": X, "tapped": X}
    inputs = {"x": X, "unread": X}
    return [
        Segment("plain", "block", module, inputs, outputs, "blocks.{block}.", dropped=("tapped",)),
        Segment("tapped", "block", module, inputs, outputs, "blocks.{block}.", "bfloat16"),
    ]


def names(values: object) -> list[str]:
    return [v.name for v in values]


def test_segments_of_one_module_are_traced_once(traces: list[str], folder: Path) -> None:
    progress = Counter()
    entries = write_graphs(two_segments(), {}, folder, progress)
    assert traces == ["plain"]
    assert progress.done == ["plain", "tapped"]
    plain, tapped = (onnx.load(folder / entries[n].file).graph for n in ("plain", "tapped"))
    assert names(plain.output) == ["y"]
    assert names(tapped.output) == ["y", "tapped"]
    assert [plain.name, tapped.name] == ["plain", "tapped"]


def test_kept_graphs_are_given_to_what_is_made_from_the_same_alone(
    traces: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, made_from = Store(tmp_path / "store"), {"class": "C", "config": {"layers": 2}}
    calls = iter(range(100))

    def traced(segments: list[Segment], dims: dict[str, int], about: dict[str, Any]) -> bool:
        traces.clear()
        folder = tmp_path / str(next(calls))
        (folder / "graphs").mkdir(parents=True)
        entries = write_graphs(segments, dims, folder, Counter(), store=store, made_from=about)
        assert entries["plain"].inputs, "described whether traced or not"
        return bool(traces)

    plain, tapped = two_segments()
    assert traced([plain, tapped], {"n": 3}, made_from)
    assert not traced(two_segments(), {"n": 3}, made_from)
    assert traced([plain], {"n": 4}, made_from)
    assert traced([plain], {"n": 3}, {**made_from, "config": {"layers": 3}})
    assert traced([replace(plain, dropped=())], {"n": 3}, made_from)
    assert traced([replace(plain, inputs={**plain.inputs, "unread": OTHER})], {"n": 3}, made_from)
    assert traced([replace(plain, module=Scale().bfloat16())], {"n": 3}, made_from)
    monkeypatch.setattr(graphs, "code_version", lambda: "an edited pass")
    assert traced([plain], {"n": 3}, made_from)


def test_entries_describe_what_was_written(traces: list[str], folder: Path) -> None:
    entries = write_graphs(two_segments(), {}, folder, Counter())
    entry = entries["tapped"]
    assert entry.file == "graphs/tapped.onnx"
    assert (entry.runs, entry.precision) == ("block", "bfloat16")
    assert entry.weights["scale"] == "blocks.{block}.scale"
    assert entry.outputs == io_entries({"y": X, "tapped": X})
    assert entries["plain"].outputs == io_entries({"y": X})
    proto = onnx.load(folder / entry.file).graph
    assert names(proto.input) == [*entry.inputs, *entry.weights]


def test_graphs_are_dumped_after_each_pass_on_request(traces: list[str], folder: Path) -> None:
    write_graphs(two_segments(), {}, folder, Counter(), folder / "dump")
    dumped = sorted(p.name for p in (folder / "dump" / "plain").iterdir())
    assert dumped[0] == "00_WeightsAsInputs.txt"
    assert len(dumped) == 6


def test_weights_are_wanted_for_every_block_in_the_graphs_dtype() -> None:
    plain = two_segments()[0]
    once = Segment("once", "step", Scale(), {}, {}, "outer.")
    entry = GraphEntry(file="f", runs="block", inputs={}, outputs={})
    entries = {
        "plain": entry.model_copy(update={"weights": {"scale": "blocks.{block}.scale"}}),
        "once": entry.model_copy(update={"weights": {"unused": "outer.unused"}}),
    }
    stages = (StageEntry(block="plain", count=2, first=2),)
    cut = Cut((plain, once), stages, {}, {}, feature_block=2, dims={}, history_dtype="float32")
    assert wanted_weights(cut, entries) == {
        "blocks.2.scale": ("bfloat16", (4,)),
        "blocks.3.scale": ("bfloat16", (4,)),
        "outer.unused": ("float32", (4,)),
    }


def test_template_graphs_have_the_declared_names(
    bfloat16_graphs: tuple[Path, dict[str, GraphEntry]],
) -> None:
    folder, entries = bfloat16_graphs
    for name, outputs in {
        "block": ["hidden_out"],
        "block_tapped": ["hidden_out", "attention_output"],
    }.items():
        graph = onnx.load(folder / entries[name].file).graph
        assert names(graph.input) == [*entries[name].inputs, *entries[name].weights]
        assert list(entries[name].inputs) == [
            "timestep_proj",
            "hidden",
            "rope_cos",
            "rope_sin",
            "attn2_key",
            "attn2_value",
        ]
        assert names(graph.output) == list(entries[name].outputs) == outputs
        assert len(entries[name].weights) == 22


def test_every_graph_of_a_bundle_is_as_its_entry_says(tiny_bundle: Bundle) -> None:
    spelled = {
        "float32": onnx.TensorProto.FLOAT,
        "bfloat16": onnx.TensorProto.BFLOAT16,
        "int64": onnx.TensorProto.INT64,
        "bool": onnx.TensorProto.BOOL,
    }
    tensors = tiny_bundle.manifest.tensors
    for name, entry in tiny_bundle.manifest.graphs.items():
        model = onnx.load(tiny_bundle.graph_path(name))
        onnx.checker.check_model(model)
        assert model.graph.name == name
        values = {v.name: v.type.tensor_type for v in (*model.graph.input, *model.graph.output)}
        assert set(values) == {*entry.inputs, *entry.weights, *entry.outputs}, name
        for value, io in {**entry.inputs, **entry.outputs}.items():
            found = [d.dim_param or d.dim_value for d in values[value].shape.dim]
            assert (values[value].elem_type, found) == (spelled[io.dtype], io.shape), (name, value)
        for value, pattern in entry.weights.items():
            tensor = tensors[pattern.replace("{block}", "0")]
            found = [d.dim_value for d in values[value].shape.dim]
            assert (values[value].elem_type, found) == (spelled[tensor.dtype], tensor.shape)


def test_no_graph_of_a_bundle_holds_a_weight(tiny_bundle: Bundle) -> None:
    for name in tiny_bundle.manifest.graphs:
        model = onnx.load(tiny_bundle.graph_path(name), load_external_data=False)
        largest = max((len(t.raw_data) for t in model.graph.initializer), default=0)
        # The large constants: 64 positions of 8 rotary frequencies, the rows of a schedule, and the
        # zeros that solves for 7 and for 5 unknowns are summed with.
        known = {
            "rotary": 64 * 8 * 4,
            "decide.solved": MAXIMUM_STEPS * 8,
            "decide.spectrum": 7 * 8 * 7 * 4,
            "decide.dmd": 5 * 6 * 7 * 4,
        }
        assert largest <= known.get(name, 256), name
