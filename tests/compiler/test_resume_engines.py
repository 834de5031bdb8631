# SPDX-License-Identifier: Apache-2.0
"""A bundle built without a GPU gets its TensorRT engines on a machine that has one."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from host_device import PLACE

from freewheel.bundle.reader import Bundle
from freewheel.compiler import graphs as tracing
from freewheel.compiler.profiles import BuildSizes
from freewheel.compiler.resume_engines import left_to_gpus, resume_engines
from freewheel.configs.errors import BuildError, RequestError
from freewheel.engines import Target
from freewheel.engines.tensorrt import TensorRT
from freewheel.runtime.model import LoadedModel
from freewheel.runtime.session import Session

SIZES = BuildSizes(height=(32, 64, 64), width=(48, 64, 96), frames=(1, 9, 17))


@pytest.fixture
def bundle(tiny_bundle: Bundle, tmp_path: Path) -> Bundle:
    shutil.copytree(tiny_bundle.folder, tmp_path / "bundle", copy_function=os.link)
    manifest = tmp_path / "bundle" / "manifest.json"
    content = manifest.read_bytes()
    manifest.unlink()  # a hard link of the other bundle's
    manifest.write_bytes(content)
    return Bundle(tmp_path / "bundle")


def test_a_machine_without_tensorrt_leaves_every_graph_to_others(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    from freewheel.engines import Availability

    lacking = Availability(False, "not here")
    monkeypatch.setattr(TensorRT, "probe", classmethod(lambda cls: lacking))
    assert left_to_gpus(bundle.manifest) == list(bundle.manifest.graphs)
    able = Availability(True, "here")
    monkeypatch.setattr(TensorRT, "probe", classmethod(lambda cls: able))
    assert left_to_gpus(bundle.manifest) == []


def test_only_engines_are_made_and_the_bundle_then_runs_with_them(
    bundle: Bundle, feigned: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tracing, "write_graphs", lambda *_: pytest.fail("traced again"))
    before = {p for p in bundle.folder.rglob("*") if p.is_file()}
    whole = resume_engines(
        bundle.folder, [TensorRT(device=PLACE)], Target(), SIZES, tmp_path / "cache"
    )
    assert [e.backend for e in whole.engines] == ["openvino", "onnxruntime", "tensorrt"]
    assert set(whole.engines[-1].files) == set(bundle.manifest.graphs)
    made = {p for p in bundle.folder.rglob("*") if p.is_file()} - before
    assert {p.relative_to(bundle.folder).parts[0] for p in made} <= {"engines", "graphs"}
    assert not list(bundle.folder.parent.glob(".bundle.building*"))
    again = Bundle(bundle.folder)
    assert again.damaged("engines", 1 << 30) == []
    make = TensorRT.__init__
    monkeypatch.setattr(TensorRT, "__init__", lambda self: make(self, device=PLACE))
    session = Session(LoadedModel(again, "tensorrt"))
    session.set_prompt("cond", {"text_states": torch.randn(1, 5, 24)})
    session.begin(torch.linspace(999, 30, 2))
    output = session.step("cond", 0, {"latents": torch.randn(1, 4, 3, 4, 6)})
    assert bool(torch.isfinite(output).all())
    with pytest.raises(RequestError, match="backend 'tensorrt': has its engines"):
        resume_engines(bundle.folder, [TensorRT()], Target(), SIZES)


def test_a_failure_leaves_the_bundle_as_it_was(
    bundle: Bundle, feigned: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = (bundle.folder / "manifest.json").read_bytes()

    def refuse(*_: Any) -> None:
        raise BuildError("g", "refused", "look")

    monkeypatch.setattr(TensorRT, "compile", refuse)
    with pytest.raises(BuildError, match="refused"):
        resume_engines(bundle.folder, [TensorRT(device=PLACE)], Target(), SIZES)
    assert (bundle.folder / "manifest.json").read_bytes() == content
    assert not list(bundle.folder.parent.glob(".bundle.building*"))
    Bundle(bundle.folder)
