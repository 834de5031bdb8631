# SPDX-License-Identifier: Apache-2.0
"""What `inspect` tells of a bundle is so, and reads well."""

from __future__ import annotations

import json
from typing import Any

import onnx
import pytest

from freewheel.bundle.reader import Bundle
from freewheel.compiler.forecast import memory_check
from freewheel.compiler.inspect import inspect_bundle, render
from freewheel.core.errors import RequestError

SIZE = {"height": 64, "width": 96, "frames": 9, "steps": 10}


@pytest.fixture(scope="module")
def data(tiny_bundle: Bundle) -> dict[str, Any]:
    return inspect_bundle(tiny_bundle, **SIZE)


def test_graphs_are_counted_by_operator(tiny_bundle: Bundle, data: dict[str, Any]) -> None:
    assert data["graphs"].keys() == tiny_bundle.manifest.graphs.keys()
    block = data["graphs"]["block"]
    nodes = onnx.load(tiny_bundle.graph_path("block")).graph.node
    assert block["nodes"] == len(nodes) == sum(block["operators"].values())
    assert block["operators"]["Attention"] == 2
    assert (block["runs"], block["weights"]) == ("block", 22)
    hidden = {"dtype": "float32", "shape": ["batch", "tokens", 32]}
    assert block["outputs"] == {"hidden_out": hidden}


def test_tensors_and_disk_add_up(tiny_bundle: Bundle, data: dict[str, Any]) -> None:
    tensors, disk = data["tensors"], data["disk"]
    assert tensors["count"] == len(tiny_bundle.manifest.tensors)
    assert tensors["bytes"] == sum(tensors["bytes_by_dtype"].values())
    assert tensors["bytes"] == tensors["linked_bytes"] + tensors["converted_bytes"]
    assert disk["bytes"] == disk["own_bytes"] + disk["linked_bytes"]
    assert disk["bytes"] >= tensors["bytes"]


def test_engines_tell_what_they_recorded(data: dict[str, Any]) -> None:
    by_backend = {e["backend"]: e for e in data["engines"]}
    assert by_backend.keys() == {"openvino", "onnxruntime"}
    for engines in by_backend.values():
        assert engines["available"]
        assert engines["bytes"] == sum(g["bytes"] for g in engines["graphs"].values()) > 0
        assert engines["graphs"]["block"]["precision"] == "float32"
    assert by_backend["openvino"]["graphs"]["block"]["details"] == {"computed_in": "float32"}


def test_the_forecast_is_for_the_size_asked_for(data: dict[str, Any]) -> None:
    assert data["dims"]["tokens"] == 3 * 4 * 6
    history = data["memory"]["caches"]["taylorseer"]
    assert (history["slots"], history["history_bytes"]) == (2, 2 * 72 * 32 * 4)
    memory = data["memory"]
    assert memory["needed_bytes"] == sum(memory["parts"].values())
    assert memory["device"] == "host"
    assert memory["verdict"] is None
    flops = data["flops"]
    per_branch = 10 * flops["computed_step"] + flops["prompt"]
    assert flops["uncached_run"] == 2 * per_branch + flops["run"]


def test_weights_that_no_step_reads_are_told_apart(data: dict[str, Any]) -> None:
    """The timestep's, the prompt's, and keys' and values' of each block."""
    tensors = data["tensors"]
    assert 0 < tensors["ahead_bytes"] < tensors["bytes"] / 2
    assert any("no step reads" in line for line in render(data))


def test_speedups_are_predicted_for_policies_and_configs(data: dict[str, Any]) -> None:
    found = data["speedup"]
    assert found["taylorseer"]["computed_steps"] == 3
    assert found["taylorseer"]["ideal_speedup"] == pytest.approx(10 / 3)
    assert found["off"]["ideal_speedup"] == 1
    assert found["adacache"]["ideal_speedup"] is None
    assert "depends on content" in found["adacache"]["reason"]


def test_the_data_is_plain_json_without_nan(data: dict[str, Any]) -> None:
    assert json.loads(json.dumps(data, allow_nan=False)).keys() == data.keys()


def test_the_text_names_everything(data: dict[str, Any]) -> None:
    text = "\n".join(render(data))
    for part in (
        "3 blocks, body float32, weights inputs",
        "engines: onnxruntime",
        "at 96x64, 9 frames (72 tokens), 10 steps, 2 branches",
        "computed step",
        "residual history",
        "depends on content",
        "3 of 10",
    ):
        assert part in text
    assert "will not fit" not in text
    assert "\x1b" not in text


def test_a_run_that_does_not_fit_is_told_with_the_number_that_decides(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_check, "memory_available_bytes", lambda: 1000)
    small = inspect_bundle(tiny_bundle, **SIZE)
    assert small["memory"]["verdict"].startswith("will not fit: ")
    assert small["memory"]["runs"] is False
    assert any("will not fit" in line and " decide: " in line for line in render(small))


def test_a_size_that_does_not_divide_is_refused(tiny_bundle: Bundle) -> None:
    with pytest.raises(RequestError, match="--frames 10"):
        inspect_bundle(tiny_bundle, frames=10)
