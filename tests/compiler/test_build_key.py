# SPDX-License-Identifier: Apache-2.0
"""Builds share a key only where everything that graphs and engines depend on is equal."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from freewheel.compiler import build_key as keys
from freewheel.compiler.build import BuildRequest
from freewheel.compiler.build_key import build_key
from freewheel.compiler.checkpoint import open_checkpoint
from freewheel.engines import Target, backend
from freewheel.runtime.settings import config_entries


@pytest.fixture
def request_(tiny_checkpoint: Path, tmp_path: Path) -> BuildRequest:
    configs = config_entries(["off"], lambda text: None)
    return BuildRequest(
        model=str(tiny_checkpoint), out=tmp_path / "b", backends=[backend("onnxruntime")],
        configs=configs,
    )  # fmt: skip


def test_equal_builds_have_equal_keys(request_: BuildRequest) -> None:
    first = build_key(request_, open_checkpoint(request_.model))
    again = replace(request_, backends=[backend("onnxruntime")])
    assert build_key(again, open_checkpoint(request_.model)) == first


def test_what_differs_has_another_key(
    request_: BuildRequest, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(request_.model)
    found = {build_key(request_, checkpoint)}
    for change in (
        {"precision": "bfloat16"}, {"weights": "baked"}, {"backends": [backend("openvino")]},
        {"target": Target(compute_capabilities=("8.9",))}, {"with_vae": True},
        {"configs": config_entries(["teacache"], lambda text: None)},
    ):  # fmt: skip
        found.add(build_key(replace(request_, **change), checkpoint))
    weights = next(tiny_checkpoint.glob("*.safetensors"))
    status = weights.stat()
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    found.add(build_key(request_, open_checkpoint(request_.model)))
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    monkeypatch.setattr(keys, "source_digest", lambda: "other code")
    found.add(build_key(request_, checkpoint))
    assert len(found) == 9
