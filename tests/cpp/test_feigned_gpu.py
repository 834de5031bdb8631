"""The C++ TensorRT backend, run: over a feigned GPU that puts work off, engines computed by OpenVINO.

`cpp/tests/feigned_gpu` holds the backend to NVIDIA's protocol. A plan holds the very graph that
OpenVINO's own engine was compiled from, so that every bit has to agree.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from graft import LARGEST
from loop import Loop, are_equal
from real_bindings import NEWEST
from safetensors.numpy import save_file
from stand_in import plan_of
from test_parity import GUIDANCE, SETTINGS, SHIFT, STEPS

from freewheel.bundle.files import sha256_of
from freewheel.bundle.reader import Bundle
from freewheel.engines.bindings import load_graph, specs_of
from freewheel.engines.record import EngineRecord
from freewheel.passes import backend_pipeline, run_passes

pytestmark = pytest.mark.openvino

MACHINE = "sm8.9"
TOOL = "tests/freewheel-run-feigned"
WAYS = {
    "plain": (), "graphs": ("--cuda-graphs",), "offload": ("--offload",),
    "offload and graphs": ("--offload", "--cuda-graphs"),
}  # fmt: skip
POLICIES = (
    "off", "teacache-modulated", "taylorseer", "adacache", "custom", "easycache", "firstblock",
    "magcache", "solved",
)  # fmt: skip
COVERING = {
    ("off", "plain", "late"), ("adacache", "plain", "late"), ("solved", "graphs", "late"),
    ("firstblock", "graphs", "late"), ("adacache", "offload", "late"), ("firstblock", "offload", "early"),
    ("solved", "offload and graphs", "early"), ("teacache-modulated", "offload and graphs", "late"),
}  # fmt: skip
"""Policy, way of driving the engines, when copies run: the others run nightly."""


def every() -> list[Any]:
    """Return the cross; copies of their own stream are those of offloaded weights alone."""
    return [
        pytest.param(*case, marks=() if case in COVERING else pytest.mark.nightly)
        for case in product(POLICIES, WAYS, ("late", "early"))
        if "offload" in case[1] or case[2] == "late"
    ]


def write_plan(graph: Path, out: Path) -> None:
    """Write the engine that a build for TensorRT would have made of a portable graph."""
    model, _ = run_passes(ir.load(graph), backend_pipeline("openvino"))
    proto = ir.to_proto(model)
    inputs, outputs = specs_of(load_graph(graph).graph, graph.name)
    profile = {
        name: [[size if isinstance(d, str) else d for d in spec.shape] for size in (1, 2, LARGEST)]
        for name, spec in inputs.items()
    }
    out.mkdir(parents=True)
    (out / "model.plan").write_bytes(plan_of(proto, [profile]))
    EngineRecord("tensorrt", NEWEST, MACHINE, "float32", inputs, outputs).write(out)


@pytest.fixture(scope="module")
def bundle(demo_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The demo bundle with engines for the feigned GPU too."""
    out = tmp_path_factory.mktemp("feigned") / "bundle"
    shutil.copytree(demo_bundle.folder, out, copy_function=os.link)
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    files = {}
    for name, graph in demo_bundle.manifest.graphs.items():
        files[name] = f"engines/tensorrt/{name}"
        write_plan(demo_bundle.path(graph.file), out / files[name])
        for made in (out / files[name]).iterdir():
            about = {"bytes": made.stat().st_size, "sha256": sha256_of(made)}
            manifest["files"][str(made.relative_to(out))] = about
    manifest["engines"].append({"backend": "tensorrt", "target": "tensorrt", "files": files})
    (out / "manifest.json").unlink()  # a hard link of the other bundle's
    (out / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return Bundle(out)


@pytest.fixture(scope="module")
def loop(bundle: Bundle) -> Loop:
    random = np.random.default_rng(0)
    latents = random.standard_normal((1, 16, 5, 12, 12), dtype=np.float32)
    states = {b: random.standard_normal((1, 24, 128), dtype=np.float32) for b in ("cond", "uncond")}
    prompts = {b: {"text_states": s} for b, s in states.items()}
    return Loop(bundle, latents, prompts, STEPS, SHIFT, "unipc", (GUIDANCE,))


@pytest.mark.parametrize(("policy", "way", "copies"), every())
def test_runs_equal_openvino_bit_for_bit(
    policy: str, way: str, copies: str, cpp_build: Path, loop: Loop, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("FREEWHEEL_FEIGNED_COPIES", copies)
    expected, told = loop.in_cpp(cpp_build, SETTINGS[policy], tmp_path)
    options = ("--backend", "tensorrt", *WAYS[way])
    found, report = loop.in_cpp(cpp_build, SETTINGS[policy], tmp_path, tool=TOOL, options=options)
    for branch, known in told["branches"].items():
        assert report["branches"][branch]["computed"] == known["computed"]
        assert report["branches"][branch]["mix"] == known["mix"]
    assert are_equal(found, expected)


def test_weights_are_offloaded_on_a_cpu_as_well(
    cpp_build: Path, loop: Loop, tmp_path: Path
) -> None:
    expected, _ = loop.in_cpp(cpp_build, SETTINGS["adacache"], tmp_path)
    options = ("--backend", "openvino", "--offload")
    found, _ = loop.in_cpp(cpp_build, SETTINGS["adacache"], tmp_path, options=options)
    assert are_equal(found, expected)


@pytest.mark.parametrize(
    ("machine", "is_served"),
    [
        ("sm9.0", False), ("sm8.6 sm8.9", True), ("sm8.0+", True), ("sm9.0+", False),
        ("sm8.10+", False), ("sm9.0 sm7.5+", True), ("sm8.9x +", False), ("sm8.9 ", True), ("", False),
    ],
)  # fmt: skip
def test_an_engine_is_loaded_by_the_gpus_that_its_record_names(
    machine: str, is_served: bool, cpp_build: Path, bundle: Bundle, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(bundle.folder, tmp_path / "bundle", copy_function=os.link))
    place = "engines/tensorrt/head/engine.json"
    about = json.loads((other / place).read_text(encoding="utf-8")) | {"machine": machine}
    manifest = json.loads((other / "manifest.json").read_text(encoding="utf-8"))
    manifest["files"][place]["bytes"] = len(json.dumps(about))
    for name, content in ((place, about), ("manifest.json", manifest)):
        (other / name).unlink()  # a hard link of the other bundle's
        (other / name).write_text(json.dumps(content), encoding="utf-8")
    states = {"cond.text_states": np.zeros((1, 24, 128), dtype=np.float32)}
    save_file(states, tmp_path / "prompts.safetensors")
    command = [
        cpp_build / TOOL, other, "--out", tmp_path / "out.safetensors", "--backend", "tensorrt", "--json",
        "--embeddings", tmp_path / "prompts.safetensors", "--guidance", 1,
    ]  # fmt: skip
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    told = done.stdout + done.stderr
    assert done.returncode == (0 if is_served else 3), told
    assert (f"compiled for {machine}, but the GPU here is sm8.9" in told) != is_served
