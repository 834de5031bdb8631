# SPDX-License-Identifier: Apache-2.0
"""What a build will need is known from config and headers, and is what it then takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from generations import generation_of

from freewheel.bundle.reader import Bundle
from freewheel.compiler.forecast import build as forecaster
from freewheel.compiler.forecast.build import describe_plan, render_plan
from freewheel.compiler.inspect import inspect_bundle
from freewheel.compiler.plan import plan
from freewheel.compiler.request import BuildRequest
from freewheel.compiler.sizes import size_of
from freewheel.engines import backend
from freewheel.runtime.settings import config_entries


def request(checkpoint: Path, out: Path, **options: object) -> BuildRequest:
    return BuildRequest(
        model=str(checkpoint),
        out=out,
        backends=[backend("openvino")],
        **{"configs": config_entries(["off"], lambda text: None), **options},
    )


def test_the_forecast_is_what_inspect_tells_of_the_bundle(
    tiny_checkpoint: Path, tiny_bundle: Bundle, tmp_path: Path
) -> None:
    planned = describe_plan(plan(request(tiny_checkpoint, tmp_path / "out")))["forecast"]
    built = inspect_bundle(tiny_bundle)
    for part in ("size", "dims", "flops"):
        assert planned[part] == built[part]
    for part in ("weight_bytes", "shared_bytes", "branch_bytes", "caches", "parts"):
        assert planned["memory"][part] == built["memory"][part]
    linked = planned["disk"]["linked_bytes"] + planned["disk"]["converted_bytes"]
    assert linked == built["tensors"]["bytes"]


def test_another_precision_is_converted_and_baked_weights_are_copied(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    def disk(**options: object) -> dict:
        return describe_plan(plan(request(tiny_checkpoint, tmp_path / "out", **options)))[
            "forecast"
        ]["disk"]

    as_stored, low, baked = disk(), disk(precision="bfloat16"), disk(weights="baked")
    assert as_stored["converted_bytes"] in (0, as_stored["needed_bytes"])
    assert low["needed_bytes"] > 0
    assert low["linked_bytes"] < as_stored["linked_bytes"] or as_stored["linked_bytes"] == 0
    assert baked["needed_bytes"] - as_stored["needed_bytes"] == baked["baked_bytes"] > 0


def test_a_full_disk_is_told_before_the_build(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forecaster, "disk_free_bytes", lambda folder: 10)
    planned = describe_plan(plan(request(tiny_checkpoint, tmp_path / "out", precision="bfloat16")))
    assert planned["forecast"]["disk"]["verdict"].startswith("will not fit: ")
    assert "of disk needed" in render_plan(planned)[-1]
    assert not (tmp_path / "out").exists()


def test_a_plan_is_for_the_size_asked_for(tiny_checkpoint: Path, tmp_path: Path) -> None:
    asked = request(tiny_checkpoint, tmp_path / "out")
    size = size_of(generation_of(), height=64, width=96, frames=9, steps=7)
    planned = describe_plan(plan(asked), size)["forecast"]
    assert planned["dims"]["tokens"] == 3 * 4 * 6
    assert planned["size"]["steps"] == 7
    whole = describe_plan(plan(asked))["forecast"]["memory"]["parts"]
    assert planned["memory"]["parts"]["hidden buffers"] < whole["hidden buffers"]


def test_a_plan_is_plain_data_and_reads_well(tiny_checkpoint: Path, tmp_path: Path) -> None:
    planned = describe_plan(plan(request(tiny_checkpoint, tmp_path / "out")))
    assert json.loads(json.dumps(planned, allow_nan=False))["blocks"] == 3
    text = "\n".join(render_plan(planned))
    assert "blocks: 3" in text
    assert "(32760 tokens)" in text
    assert "disk: " in text
