# SPDX-License-Identifier: Apache-2.0
"""A bundle built without a GPU gets its TensorRT engines on a machine that has one."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from host_device import PLACE
from stand_in import MAGIC
from typer.testing import CliRunner

from freewheel.bundle.reader import Bundle
from freewheel.cli import app
from freewheel.compiler.graphs import write as tracing
from freewheel.compiler.profiles import BuildSizes
from freewheel.compiler.resume_engines import left_to_gpus, resume_engines
from freewheel.core.errors import BuildError, RequestError
from freewheel.engines import Availability, Target
from freewheel.engines.record import EngineRecord
from freewheel.engines.tensorrt import TensorRT
from freewheel.runtime.model import Model
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
    session = Session(Model(again, "tensorrt"))
    session.set_prompt("cond", {"text_states": torch.randn(1, 5, 24)})
    session.begin(torch.linspace(999, 30, 2))
    output = session.step("cond", 0, {"latents": torch.randn(1, 4, 3, 4, 6)})
    assert bool(torch.isfinite(output).all())
    with pytest.raises(RequestError, match="backend 'tensorrt': has its engines"):
        resume_engines(bundle.folder, [TensorRT()], Target(), SIZES)


def test_a_build_without_a_gpu_says_what_is_left_and_the_command_it_prints_does_that(
    tiny_checkpoint: Path,
    build_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    lacking = Availability(False, "the package 'tensorrt' is not installed")
    monkeypatch.setattr(TensorRT, "probe", classmethod(lambda cls: lacking))
    out, runner = tmp_path / "bundle", CliRunner()
    common = ["--build-cache", str(build_cache)]
    command = ["build", str(tiny_checkpoint), "--out", str(out), "--backend", "onnxruntime"]
    listed = runner.invoke(app, [*command, *common, "--json"])
    assert listed.exit_code == 0, listed.output
    graphs = Bundle(out).manifest.graphs
    assert json.loads(listed.stdout)["left_to_gpus"] == list(graphs)
    built = runner.invoke(app, [*command, *common, "--force"])
    assert built.exit_code == 0, built.output
    told = " ".join(built.stderr.split())
    assert f"TensorRT would compile {len(graphs)} graphs of it on a machine with a GPU" in told
    printed = re.search(
        r"freewheel (build \S+ --out \S+ --resume-engines --backend tensorrt)", told
    )
    assert printed is not None

    monkeypatch.undo()
    feigned = request.getfixturevalue("feigned")
    options = "--height 32:48:64 --width 64 --frames 9 --hardware-compatibility ampere_plus"
    options += " --tiling fast --preview aliased_plugin_io_10_03 --optimization-level 2"
    resumed = runner.invoke(app, [*printed[1].split(), *options.split(), *common])
    assert resumed.exit_code == 0, resumed.output
    engines = Bundle(out).engines("tensorrt")
    assert engines is not None
    assert set(engines.files) == set(graphs)
    assert feigned.configs
    for config in feigned.configs:
        assert config.tiling_optimization_level.name == "FAST"
        assert config._previews["ALIASED_PLUGIN_IO_10_03"]
        assert config.builder_optimization_level == 2
    record = EngineRecord.read(out / engines.files["head"])
    assert record.machine == "sm8.0+"
    smallest, usual, largest = record.details["profiles"]["latents"]
    assert [smallest[-2], usual[-2], largest[-2]] == [4, 6, 8]
    plan = (out / engines.files["head"] / "model.plan").read_bytes()
    wide, narrow = json.loads(plan.removeprefix(MAGIC).partition(b"\n")[0])["profiles"]
    assert wide["latents"] == [smallest, usual, largest]
    assert narrow["latents"] == [usual, usual, usual]


def test_engines_are_built_on_the_gpu_of_an_index(
    bundle: Bundle, feigned: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    capabilities, current, built_on = [(8, 9), (9, 0)], [0], set()

    @contextmanager
    def select(place: torch.device) -> Iterator[None]:
        before, current[0] = current[0], place.index
        yield
        current[0] = before

    def capability(place: torch.device | None = None) -> tuple[int, int]:
        return capabilities[current[0] if place is None else place.index]

    def make(logger: Any) -> Any:
        built_on.add(current[0])
        return builder(logger)

    builder = feigned.classes["Builder"]
    monkeypatch.setitem(feigned.classes, "Builder", make)
    monkeypatch.setattr(torch.cuda, "device", select)
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    command = ["build", "-", "--out", str(bundle.folder), "--resume-engines", "--backend"]
    sizes = ["--height", "64", "--width", "64", "--frames", "9"]
    for backend, index, fault in (
        ("tensorrt", "2", "--device: is 2, and there are 2 GPUs; give 0 to 1"),
        ("onnxruntime", "0", "--device: means nothing to onnxruntime"),
    ):
        refused = CliRunner().invoke(app, [*command, backend, "--device", index])
        assert refused.exit_code == 3
        assert fault in " ".join(refused.stderr.split())
    done = CliRunner().invoke(app, [*command, "tensorrt", "--device", "1", *sizes])
    assert done.exit_code == 0, done.output
    assert built_on == {1}
    engines = Bundle(bundle.folder).engines("tensorrt")
    assert engines is not None
    assert EngineRecord.read(bundle.folder / engines.files["head"]).machine == "sm9.0"


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
