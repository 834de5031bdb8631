# SPDX-License-Identifier: Apache-2.0
"""Real engines, built ahead of time with TensorRT-RTX on a machine without a GPU."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from freewheel.core.errors import BackendUnavailable, BuildError, BundleError
from freewheel.engines import Target, backend
from freewheel.engines.tensorrt import TensorRT, TensorRTRTX
from freewheel.engines.tensorrt_journal import fault_recorder

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
pytestmark = pytest.mark.tensorrt

MATMUL = {"x": ((1, 1, 64), (1, 1560, 64), (2, 32760, 64))}
HEADS = ((1, 12, 64, 128), (1, 12, 1560, 128), (2, 12, 32760, 128))
ATTENTION = {"q": HEADS, "k": HEADS, "v": HEADS}
WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="tells what lacks without one")


@pytest.fixture
def build(graph):
    """Compile a named graph and return its folder and record."""

    def run(name, target, **settings):
        path = graph(name)
        folder = path.parent / f"{name}.engine"
        TensorRTRTX(**settings).compile(path, target, folder)
        return folder, json.loads((folder / "engine.json").read_text())

    return run


def test_matmul_with_weight_as_input_and_dynamic_shape(build):
    folder, record = build("matmul_bf16", Target("bfloat16", MATMUL, ("8.9",)))
    assert record["backend"] == "tensorrt-rtx"
    assert record["machine"] == "sm8.9"
    assert record["inputs"]["w"] == {"dtype": "bfloat16", "shape": [64, 64]}
    assert record["details"]["nodes"] == {"MatMul": 1}
    assert any(layer["type"] == "gemm" for layer in record["details"]["layers"])
    assert sorted(p.name for p in folder.iterdir()) == ["engine.json", "model.plan"]
    assert sorted(p.name for p in folder.parent.glob("*")) == [
        "matmul_bf16.engine",
        "matmul_bf16.onnx",
    ]


def test_bfloat16_attention_is_one_fused_kernel(build):
    _, record = build("attention_bf16", Target("bfloat16", ATTENTION, ("8.9",)))
    kernels = " ".join(layer["kernel"] for layer in record["details"]["layers"])
    assert "mha" in kernels
    # scores of 32,760 tokens would take 48 GiB, were they ever stored
    assert record["details"]["activation_bytes"] < 2**32


def test_float32_attention_is_split_because_no_kernel_fuses_it(build):
    small = ((1, 12, 4, 128), (1, 12, 8, 128), (1, 12, 16, 128))
    _, record = build("attention", Target("float32", dict.fromkeys("qkv", small), ("8.9",)))
    kernels = " ".join(layer["kernel"] for layer in record["details"]["layers"])
    assert "mha" not in kernels
    assert sum(layer["type"] == "gemm" for layer in record["details"]["layers"]) == 2


def test_a_weight_in_float8_is_an_input(build):
    profiles = {"x": ((1, 64), (64, 64), (4096, 64))}
    target = Target("bfloat16", profiles, ("8.9", "12.0"))
    assert TensorRTRTX().takes_float8(target)
    _, record = build("read_float8", target)
    assert record["inputs"]["w"] == {"dtype": "float8_e4m3fn", "shape": [64, 64]}


@pytest.mark.parametrize("capabilities", [("8.6",), ("8.6", "8.9", "12.0")])
def test_gpus_without_float8_are_refused_a_weight_in_it(build, capabilities):
    target = Target("bfloat16", {"x": ((1, 64), (64, 64), (4096, 64))}, capabilities)
    assert not TensorRTRTX().takes_float8(target)
    with pytest.raises(
        BuildError, match=r"tensor 'w': is in float8_e4m3fn, .* 8\.9 lack"
    ) as caught:
        build("read_float8", target)
    assert "--float8 convert" in caught.value.hint


def test_an_engine_that_older_gpus_run_too_takes_no_float8():
    options = {"hardware_compatibility_level": "ampere_plus"}
    assert not TensorRT().takes_float8(Target(compute_capabilities=("9.0",), options=options))
    assert TensorRT().takes_float8(Target(compute_capabilities=("9.0",)))


def test_rotary_embedding_builds(build):
    tables = ((1, 64, 64), (1, 1560, 64), (2, 32760, 64))
    profiles = {"x": HEADS, "rope_cos": tables, "rope_sin": tables}
    _, record = build("rotary", Target("bfloat16", profiles, ("8.9",)))
    assert record["details"]["nodes"] == {"RotaryEmbedding": 1}
    assert record["details"]["layers"]


def test_several_targets_share_one_plan(build):
    _, one = build("matmul_bf16", Target("bfloat16", MATMUL, ("8.9",)))
    _, three = build("matmul_bf16", Target("bfloat16", MATMUL, ("8.0", "8.9", "12.0")))
    assert three["machine"] == "sm8.0 sm8.9 sm12.0"
    assert three["files"]["model.plan"] < 1.1 * one["files"]["model.plan"]


def test_without_targets_the_usual_ones_are_taken_and_recorded(build):
    _, record = build("matmul_bf16", Target("bfloat16", MATMUL))
    assert record["machine"] == "sm8.6 sm8.9 sm12.0"


def test_equal_graphs_give_equal_plans(build):
    plans = [
        (build("matmul_bf16", Target("bfloat16", MATMUL, ("8.9",)))[0] / "model.plan").read_bytes()
        for _ in range(2)
    ]
    assert plans[0] == plans[1]


def test_policy_like_graphs_with_scalars_build(build):
    profiles = {"x": ((1, 4), (8, 4), (64, 4))}
    _, record = build("scalars", Target("float32", profiles, ("8.9",)))
    assert record["inputs"]["step"] == {"dtype": "int64", "shape": []}


def test_baked_weights_are_mapped_and_end_up_in_the_plan(baked, tmp_path):
    path, _ = baked
    profiles = {"x": ((1, 64), (8, 64), (64, 64))}
    target = Target("float32", profiles, ("8.9",))
    TensorRTRTX().compile(path, target, tmp_path / "engine")
    assert (tmp_path / "engine" / "model.plan").stat().st_size > 64 * 64 * 4


def test_baked_weights_that_are_cut_off_are_named(baked, tmp_path):
    path, _ = baked
    (path.parent / "weights.bin").write_bytes(b"short")
    target = Target("float32", {"x": ((1, 64), (8, 64), (64, 64))}, ("8.9",))
    with pytest.raises(BuildError) as caught:
        TensorRTRTX().compile(path, target, tmp_path / "engine")
    assert "weight 'w'" in caught.value.where
    assert "weights.bin" in caught.value.what


def test_options_reach_the_builder_and_the_record(build):
    options = {
        "builder_optimization_level": 1,
        "workspace_bytes": 2**28,
        "max_aux_streams": 0,
        "tiling_optimization_level": "fast",
    }
    _, record = build("matmul_bf16", Target("bfloat16", MATMUL, ("8.9",), options))
    assert record["details"]["options"] == options


def test_progress_reports_rising_steps_of_each_phase(build):
    seen = []
    target = Target("bfloat16", MATMUL, ("8.9",))
    build("matmul_bf16", target, progress=lambda *step: seen.append(step))
    assert seen[0] == ("Building engine", 0, seen[0][2])
    assert ("Building engine", seen[0][2], seen[0][2]) in seen
    assert all(0 <= done <= total for _, done, total in seen)


def test_a_fault_in_the_progress_callback_stops_the_build(graph, tmp_path):
    def interrupted(*_):
        raise KeyboardInterrupt

    target = Target("bfloat16", MATMUL, ("8.9",))
    with pytest.raises(KeyboardInterrupt):
        TensorRTRTX(progress=interrupted).compile(graph("matmul_bf16"), target, tmp_path / "engine")
    assert not (tmp_path / "engine").exists()


def test_the_timing_cache_lies_in_the_folder_asked_for(build, tmp_path):
    for _ in range(2):
        build("matmul_bf16", Target("bfloat16", MATMUL, ("8.9",)), cache_folder=tmp_path / "cache")
    caches = [p for p in (tmp_path / "cache").iterdir() if p.suffix == ".timing"]
    assert len(caches) == 1
    assert caches[0].stat().st_size > 0


def test_nothing_is_printed_on_stdout(build, capfd):
    build("matmul_bf16", Target("bfloat16", MATMUL, ("8.9",)))
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    ("name", "target", "where", "what", "hint"),
    [
        ("unknown_op", Target("float32", {"x": ((1, 4), (2, 4), (3, 4))}, ("8.9",)),
         "unknown_op.onnx", "node 'peculiar' (Fourierise)", "pass"),
        ("matmul", Target("float32", MATMUL, ("9.0",)),
         "matmul.onnx", "'9.0' is unknown", "known: 7.5, 8.0, 8.6, 8.9, 12.0, 12.1"),
        ("matmul", Target("float32", MATMUL, ("x",)),
         "matmul.onnx", "'x' is unknown", "known: 7.5"),
        ("matmul", Target("float32", {}, ("8.9",)),
         "input 'x'", "[batch, tokens, 64] is dynamic", "smallest, usual and largest"),
        ("matmul", Target("float32", {"x": ((1, 64), (1, 64), (1, 64))}, ("8.9",)),
         "input 'x'", "has not the input's 3 dimensions", "[batch, tokens, 64]"),
        ("matmul", Target("float32", {"x": ((1, 1, 32), (1, 5, 64), (2, 9, 64))}, ("8.9",)),
         "input 'x'", "fixed at 64", "give 64"),
        ("matmul", Target("float32", {"x": ((1, 7, 64), (1, 5, 64), (2, 9, 64))}, ("8.9",)),
         "input 'x'", "profile of 'tokens' is (7, 5, 9)", "min:opt:max"),
        ("attention", Target("float32", {**ATTENTION, "v": (HEADS[0],) * 3}, ("8.9",)),
         "input 'v'", "profile of 'batch' is (1, 1, 1), but (1, 1, 2) for input 'q'", "one range"),
        ("matmul", Target("float32", MATMUL, ("8.9",), {"workspace": 1}),
         "option 'workspace'", "no such build option", "did you mean 'workspace_bytes'"),
        ("matmul", Target("float8", MATMUL, ("8.9",)),
         "matmul.onnx", "float8 is not among", "--precision"),
    ],
)  # fmt: skip
def test_bad_input_is_named_and_leaves_nothing_behind(graph, name, target, where, what, hint):
    path = graph(name)
    with pytest.raises(BuildError) as caught:
        TensorRTRTX().compile(path, target, path.parent / "engine")
    assert where in caught.value.where
    assert what in caught.value.what
    assert hint in caught.value.hint
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_profiles_that_contradict_each_other_are_refused(graph):
    profiles = {
        "x": ((1, 2, 4), (2, 3, 4), (4, 4, 4)),
        "y": ((2, 4), (7, 4), (16, 4)),  # 2 * 3 is not 7
    }
    path = graph("flattened")
    with pytest.raises(BuildError) as caught:
        TensorRTRTX().compile(path, Target("float32", profiles, ("8.9",)), path.parent / "engine")
    assert "flattened.onnx" in caught.value.where
    assert "constraint" in caught.value.what
    assert "fit each other" in caught.value.hint


@WITHOUT_GPU
def test_probe_tells_building_here_from_running_here():
    found = TensorRTRTX.probe()
    assert not found.available
    assert found.can_build
    assert "can build here but not run: no NVIDIA GPU" in found.reason


def test_probe_refuses_a_gpu_that_the_package_does_not_know(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Hopper")
    found = TensorRTRTX.probe()
    assert not found.available
    assert "compute capability 9.0 is none of 7.5, 8.0" in found.reason
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 9))
    assert TensorRTRTX.probe().available


@WITHOUT_GPU
def test_loading_without_a_gpu_is_refused(build):
    folder, _ = build("matmul_bf16", Target("bfloat16", MATMUL, ("8.9",)))
    with pytest.raises(BackendUnavailable, match="no NVIDIA GPU"):
        TensorRTRTX().load(folder)
    with pytest.raises(BackendUnavailable):
        backend("tensorrt-rtx")
    assert backend("tensorrt-rtx", to_build=True).name == "tensorrt-rtx"


def test_a_truncated_plan_is_refused(build):
    folder, _ = build("matmul_bf16", Target("bfloat16", MATMUL, ("8.9",)))
    plan = folder / "model.plan"
    plan.write_bytes(plan.read_bytes()[:1000])
    with pytest.raises(BundleError, match="has 1000 bytes"):
        TensorRTRTX().load(folder)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"machine": "sm8.0 sm12.0"}, "compiled for sm8.0 sm12.0, but the GPU here is sm8.9"),
        ({"version": "1.0"}, "compiled for version '1.0'"),
        ({"backend": "tensorrt"}, "compiled for backend 'tensorrt'"),
    ],
)
def test_an_engine_for_something_else_is_refused(build, monkeypatch, changes, what):
    folder, record = build("matmul_bf16", Target("bfloat16", MATMUL, ("8.9",)))
    (folder / "engine.json").write_text(json.dumps({**record, **changes}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "RTX")
    with pytest.raises(BundleError) as caught:
        TensorRTRTX().load(folder)
    assert what in caught.value.what
    assert "rebuild" in caught.value.hint


def test_tensorrt_compiles_for_the_gpu_at_hand_only(graph, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 9))
    refused = Target("float32", MATMUL, ("8.0",))
    with pytest.raises(BuildError, match=r"the GPU here is 8\.9"):
        TensorRT()._capabilities(None, refused, str(graph("matmul")))
    assert TensorRT()._capabilities(None, Target(), "here") == ("8.9",)


@pytest.mark.parametrize("option", ["hardware_compatibility_level", "preview_features"])
def test_an_unknown_name_of_an_option_is_refused_with_the_known_ones(option):
    with pytest.raises(BuildError, match=rf"option '{option}': 'ampere' is not among .*_"):
        TensorRTRTX().complete(Target(options={option: "ampere"}))


def test_weight_streaming_is_no_option_since_weights_are_inputs():
    with pytest.raises(BuildError, match="no such build option"):
        TensorRTRTX().complete(Target(options={"weight_streaming": True}))


def test_a_target_is_completed_before_anything_is_traced():
    assert TensorRTRTX().complete(Target()).compute_capabilities == ("8.6", "8.9", "12.0")
    asked = Target(compute_capabilities=("12.0",), options={"builder_optimization_level": 5})
    assert TensorRTRTX().complete(asked) == asked
    with pytest.raises(BuildError, match=r"backend 'tensorrt-rtx': .*'9.0' is unknown"):
        TensorRTRTX().complete(Target(compute_capabilities=("8.9", "9.0")))
    with pytest.raises(BuildError, match="option 'level': no such build option"):
        TensorRTRTX().complete(Target(options={"level": 3}))
    with pytest.raises(BuildError, match="is 6, levels go from 0 to 5"):
        TensorRTRTX().complete(Target(options={"builder_optimization_level": 6}))


def test_an_engine_goes_into_nvidias_own_tools_as_documented(build, repository):
    """As far as a machine without a GPU can go: TensorRT-RTX reads the header of the plan."""
    import tensorrt_rtx as trt

    folder, _ = build("matmul_bf16", Target("bfloat16", MATMUL, ("8.9",)))
    text = (repository / "docs" / "explanation" / "tensorrt.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"^```python\n(import json, pathlib\n.*?)^```", text, re.M | re.S)
    snippet = snippet.replace("out/bundle/engines/SET/block", str(folder))
    told = subprocess.run(
        [sys.executable, "-c", snippet], capture_output=True, text=True, check=True
    )
    assert told.stdout.strip() == "x:1x1560x64"

    runtime, faults = trt.Runtime(trt.Logger(trt.Logger.ERROR)), fault_recorder(trt)
    runtime.error_recorder = faults
    if runtime.deserialize_cuda_engine((folder / "model.plan").read_bytes()) is None:
        assert "magic" not in faults.take()
    assert runtime.deserialize_cuda_engine(b"no plan" * 1000) is None
    assert "magic" in faults.take()

    lines = [n for n in text.splitlines() if "polygraphy run" in n]
    assert [line.partition("polygraphy")[0] for line in lines] == [
        "",
        "POLYGRAPHY_USE_TENSORRT_RTX=1 ",
    ]
    script = folder.parent / "script.py"
    tool = Path(sys.executable).with_name("polygraphy")
    for line in lines:
        setting, _, command = line.partition("polygraphy ")
        arguments = command.replace("out/bundle/engines/SET/block", str(folder)).split()
        done = subprocess.run(
            [tool, *arguments, "--gen-script", script],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, **dict([setting.strip().split("=")] if setting else [])},
        )
        assert done.returncode == 0, done.stderr
        assert "EngineFromBytes" in script.read_text()
        script.unlink()
