"""The C++ backends of TensorRT and TensorRT-RTX, run: over a feigned GPU that puts work off, engines
computed by OpenVINO.

`cpp/tests/feigned_gpu` holds the backend to NVIDIA's protocol. A plan holds the very graph that
OpenVINO's own engine was compiled from, so that every bit has to agree.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
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
from stand_in import MAGIC, plan_of
from test_parity import GUIDANCE, SETTINGS, SHIFT, STEPS

from freewheel.bundle.files import sha256_of
from freewheel.bundle.reader import Bundle
from freewheel.engines.bindings import load_graph, specs_of
from freewheel.engines.record import EngineRecord
from freewheel.passes import backend_pipeline, run_passes
from freewheel.policies import POLICIES

pytestmark = pytest.mark.openvino

MACHINE = "sm8.9"
TOOLS = {
    "tensorrt": "tests/freewheel-run-feigned",
    "tensorrt-rtx": "tests/freewheel-run-feigned-rtx",
}
"""Backend → freewheel-run with it alone."""
VERSIONS = {"tensorrt": NEWEST, "tensorrt-rtx": "1.7.1.116"}
"""Backend → what its stand-in in `cpp/tests/feigned_gpu` calls itself."""
FLAGS = {"tensorrt": (), "tensorrt-rtx": ("REQUIRE_USER_ALLOCATION",)}
"""Backend → builder flags of its plans."""
WAYS = {
    "plain": (),
    "graphs": ("--cuda-graphs",),
    "offload": ("--offload",),
    "offload and graphs": ("--offload", "--cuda-graphs"),
}
DRIVEN = [n for n, s in SETTINGS.items() if n == s.policy != "teacache"] + ["teacache-modulated"]
"""A setting of each policy; TeaCache by the signal that is not known ahead."""
COVERING = {
    ("tensorrt", "off", "plain", "late"),
    ("tensorrt", "adacache", "plain", "late"),
    ("tensorrt", "solved", "graphs", "late"),
    ("tensorrt", "firstblock", "graphs", "late"),
    ("tensorrt", "adacache", "offload", "late"),
    ("tensorrt", "firstblock", "offload", "early"),
    ("tensorrt", "solved", "offload and graphs", "early"),
    ("tensorrt", "teacache-modulated", "offload and graphs", "late"),
    ("tensorrt", "dbcache", "offload and graphs", "early"),
    ("tensorrt-rtx", "dicache", "plain", "late"),
    ("tensorrt-rtx", "spectrum", "offload and graphs", "early"),
}
"""Backend, policy, way of driving the engines, when copies run: the others run nightly."""


def every() -> list[Any]:
    """Return the cross; copies of their own stream are those of offloaded weights alone."""
    return [
        pytest.param(*case, marks=() if case in COVERING else pytest.mark.nightly)
        for case in product(TOOLS, DRIVEN, WAYS, ("late", "early"))
        if "offload" in case[2] or case[3] == "late"
    ]


def test_a_setting_of_each_policy_is_driven() -> None:
    assert {SETTINGS[name].policy for name in DRIVEN} == set(POLICIES)


def write_plans(graph: Path, outs: dict[str, Path]) -> None:
    """Write the engines that builds for TensorRT would have made of a portable graph.

    Args:
        graph: What the other engines were compiled from.
        outs: Backend → folder.
    """
    model, _ = run_passes(ir.load(graph), backend_pipeline("openvino"))
    proto = ir.to_proto(model)
    inputs, outputs = specs_of(load_graph(graph).graph, graph.name)
    profile = {
        name: [[size if isinstance(d, str) else d for d in spec.shape] for size in (1, 2, LARGEST)]
        for name, spec in inputs.items()
    }
    for backend, out in outs.items():
        out.mkdir(parents=True)
        (out / "model.plan").write_bytes(plan_of(proto, [profile], FLAGS[backend]))
        record = EngineRecord(backend, VERSIONS[backend], MACHINE, "float32", inputs, outputs)
        record.write(out)


@pytest.fixture(scope="module")
def bundle(demo_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The demo bundle with engines for the feigned GPU too."""
    out = tmp_path_factory.mktemp("feigned") / "bundle"
    shutil.copytree(demo_bundle.folder, out, copy_function=os.link)
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    graphs = demo_bundle.manifest.graphs
    files = {b: {name: f"engines/{b}/{name}" for name in graphs} for b in TOOLS}
    for name, graph in graphs.items():
        outs = {backend: out / places[name] for backend, places in files.items()}
        write_plans(demo_bundle.path(graph.file), outs)
        for made in (file for place in outs.values() for file in place.iterdir()):
            about = {"bytes": made.stat().st_size, "sha256": sha256_of(made)}
            manifest["files"][str(made.relative_to(out))] = about
    manifest["engines"] += [{"backend": b, "target": b, "files": f} for b, f in files.items()]
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


@pytest.mark.parametrize(("backend", "policy", "way", "copies"), every())
def test_runs_equal_openvino_bit_for_bit(
    backend: str,
    policy: str,
    way: str,
    copies: str,
    cpp_build: Path,
    loop: Loop,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FREEWHEEL_FEIGNED_COPIES", copies)
    expected, told = loop.in_cpp(cpp_build, SETTINGS[policy], tmp_path)
    options = ("--backend", backend, *WAYS[way])
    tool = TOOLS[backend]
    found, report = loop.in_cpp(cpp_build, SETTINGS[policy], tmp_path, tool=tool, options=options)
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
    ("options", "where"), [(("--cuda-graphs",), "cuda_graphs"), (("--device", "1"), "device")]
)
def test_options_of_gpus_are_refused_on_a_cpu(
    options: tuple[str, ...], where: str, bundle: Bundle, cpp_build: Path, tmp_path: Path
) -> None:
    done = run_feigned(cpp_build, "openvino", bundle.folder, tmp_path, *options)
    assert done.returncode == 3
    assert json.loads(done.stdout)["error"]["where"] == where
    assert "means nothing to openvino" in done.stdout


@pytest.mark.parametrize(
    ("machine", "is_served"),
    [
        ("sm9.0", False),
        ("sm8.6 sm8.9", True),
        ("sm8.0+", True),
        ("sm9.0+", False),
        ("sm8.10+", False),
        ("sm9.0 sm7.5+", True),
        ("sm8.9x +", False),
        ("sm8.9 ", True),
        ("", False),
    ],
)
def test_an_engine_is_loaded_by_the_gpus_that_its_record_names(
    machine: str, is_served: bool, cpp_build: Path, bundle: Bundle, tmp_path: Path
) -> None:
    place = "engines/tensorrt/head/engine.json"
    about = json.loads(bundle.path(place).read_text(encoding="utf-8")) | {"machine": machine}
    other = changed(bundle, tmp_path / "bundle", place, json.dumps(about).encode())
    done = run_feigned(cpp_build, "tensorrt", other, tmp_path)
    told = done.stdout + done.stderr
    assert done.returncode == (0 if is_served else 3), told
    assert (f"compiled for {machine}, but the GPU here is sm8.9" in told) != is_served


def changed(bundle: Bundle, folder: Path, place: str, content: bytes) -> Path:
    """Link a bundle's files, but for one of other content."""
    shutil.copytree(bundle.folder, folder, copy_function=os.link)
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    for name in (place, "manifest.json"):
        (folder / name).unlink()
    (folder / place).write_bytes(content)
    about = {"bytes": len(content), "sha256": sha256_of(folder / place)}
    manifest["files"][place] = about
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder


def run_feigned(build: Path, backend: str, bundle: Path, folder: Path, *options: str) -> Any:
    """Run a bundle's default config once; ``folder`` takes what that needs."""
    states = {"cond.text_states": np.zeros((1, 24, 128), dtype=np.float32)}
    save_file(states, folder / "prompts.safetensors")
    command = [
        build / TOOLS.get(backend, "freewheel-run"), bundle, "--out", folder / "out.safetensors", "--backend", backend,
        "--embeddings", folder / "prompts.safetensors", "--guidance", 1, "--json", *options,
    ]  # fmt: skip
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)


@pytest.fixture
def kernels(bundle: Bundle, tmp_path: Path) -> Callable[[], tuple[int, set[str]]]:
    """Return a function that reads what TensorRT-RTX compiled: when it began, and the kernels."""
    shutil.copytree(bundle.folder, tmp_path / "bundle", copy_function=os.link)
    name = f"tensorrt_rtx-{VERSIONS['tensorrt-rtx']}-Feigned-GPU.runtime"

    def read() -> tuple[int, set[str]]:
        content = (tmp_path / "freewheel-cache" / name).read_bytes()
        found = json.loads(content.removeprefix(MAGIC))
        return found["made"], set(found["kernels"])

    return read


def test_rtx_goes_on_with_the_kernels_that_a_process_before_compiled(
    kernels: Callable[[], tuple[int, set[str]]], cpp_build: Path, tmp_path: Path
) -> None:
    """For graphs others are compiled: final ones, which none may stand in for while they are made."""
    began, made = [], []
    for options in ((), (), ("--cuda-graphs",)):
        done = run_feigned(cpp_build, "tensorrt-rtx", tmp_path / "bundle", tmp_path, *options)
        assert done.returncode == 0, done.stderr
        when, which = kernels()
        began.append(when)
        made.append(which)
    assert len(set(began)) == 1
    assert made[0] == made[1] < made[2]
    assert {k.split()[1] for k in made[1]} == {"lazy"}
    assert {k.split()[1] for k in made[2] - made[1]} == {"eager"}


def test_rtx_compiles_anew_where_kept_kernels_are_refused(
    kernels: Callable[[], tuple[int, set[str]]], cpp_build: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "freewheel-cache"
    folder.mkdir()
    name = f"tensorrt_rtx-{VERSIONS['tensorrt-rtx']}-Feigned-GPU.runtime"
    (folder / name).write_bytes(b"kernels of another GPU")
    done = run_feigned(cpp_build, "tensorrt-rtx", tmp_path / "bundle", tmp_path)
    assert done.returncode == 0, done.stderr
    assert kernels()[1]


def test_rtx_engines_that_may_allocate_are_not_recorded(
    bundle: Bundle, cpp_build: Path, tmp_path: Path
) -> None:
    place = "engines/tensorrt-rtx/head/model.plan"
    head, _, graph = bundle.path(place).read_bytes().removeprefix(MAGIC).partition(b"\n")
    about = json.dumps(json.loads(head) | {"flags": []}).encode()
    plan = MAGIC + about.ljust(len(head)) + b"\n" + graph  # as long as its record says
    other = changed(bundle, tmp_path / "bundle", place, plan)
    for options, code in (((), 0), (("--cuda-graphs",), 3)):
        done = run_feigned(cpp_build, "tensorrt-rtx", other, tmp_path, *options)
        assert done.returncode == code, done.stderr
    assert "engine 'head': can't be recorded into a CUDA graph" in done.stdout + done.stderr
    assert "leave cuda_graphs out" in done.stdout + done.stderr
