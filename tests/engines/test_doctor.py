# SPDX-License-Identifier: Apache-2.0
"""The doctor finds what a machine has, and says of what it lacks how to get it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from freewheel.core.extras import EXTRAS
from freewheel.engines import BACKENDS, Availability, doctor
from freewheel.engines.doctor import examine, render
from freewheel.engines.onnxruntime import OnnxRuntime
from freewheel.engines.openvino import OpenVino
from freewheel.engines.tensorrt import TensorRT, TensorRTRTX

CPUINFO = """processor : 0
model name : A CPU of 2024
flags : fpu avx2 avx512f amx_bf16

processor : 1
model name : A CPU of 2024
flags : fpu avx2 avx512f amx_bf16
"""


def test_everything_asked_of_a_machine_is_answered(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cpuinfo").write_text(CPUINFO, encoding="utf-8")
    monkeypatch.setattr(doctor, "CPUINFO", tmp_path / "cpuinfo")
    found = examine(tmp_path / "not" / "there")
    json.dumps(found, allow_nan=False)
    assert [b["name"] for b in found["backends"]] == list(BACKENDS)
    assert [e["name"] for e in found["extras"]] == [n for n in EXTRAS if n not in BACKENDS]
    assert found["cpu"]["model"] == "A CPU of 2024"
    here = {name for name, is_here in found["cpu"]["features"].items() if is_here}
    assert here == {"avx2", "avx512f", "amx_bf16"}
    assert found["disk"]["free_bytes"] > 0
    assert set(found["versions"]) >= {"freewheel", "python", "torch", "diffusers"}
    text = "\n".join(render(found))
    assert "cpu: A CPU of 2024" in text
    assert "yes  amx_bf16" in text
    assert "no   avx512_bf16" in text


def test_a_machine_without_anything_is_told_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lacking = Availability(False, "the package 'x' is not installed", "pip install x")
    for backend in (TensorRT, TensorRTRTX, OpenVino, OnnxRuntime):
        monkeypatch.setattr(backend, "probe", classmethod(lambda cls: lacking))
    monkeypatch.setattr(doctor, "missing", lambda extra: list(EXTRAS[extra].values()))
    monkeypatch.setattr(doctor, "_version", lambda package: None)
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr(doctor, "CPUINFO", tmp_path / "none")
    monkeypatch.setattr(doctor, "OUR_BUILD", tmp_path)
    monkeypatch.setattr(doctor, "memory_available_bytes", lambda: None)
    found = examine(tmp_path)
    assert found["auto"] is None
    assert found["cpu"]["features"] == {}
    text = "\n".join(render(found))
    assert "--backend auto takes none: no backend runs here" in text
    assert "no   openvino      the package 'x' is not installed; pip install x" in text
    lacks = ", ".join(EXTRAS["report"].values())
    assert f"no   report        {lacks}; pip install 'freewheel[report]'" in text
    assert "no   ffmpeg        pip install 'freewheel[video]'" in text
    assert "no   cmake         apt-get install cmake" in text
    assert "memory: unknown available" in text


def test_a_program_that_make_built_is_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "freewheel-run").touch()
    monkeypatch.setattr(doctor, "OUR_BUILD", tmp_path)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    (tool,) = (t for t in examine(tmp_path)["tools"] if t["name"] == "freewheel-run")
    assert tool == {
        "name": "freewheel-run",
        "path": str(tmp_path / "freewheel-run"),
        "install": "",
    }
