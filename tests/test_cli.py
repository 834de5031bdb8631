"""The command line: results on stdout, one message and the right exit code for every bad input."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
from typer.testing import CliRunner, Result

from freewheel.bundle.reader import Bundle
from freewheel.cli import _run_tables, app
from freewheel.console import Screen
from freewheel.runtime.statistics import BranchStatistics, RunStatistics
from freewheel.runtime.trace import Trace

Run = Callable[..., Result]


@pytest.fixture
def freewheel() -> Run:
    runner = CliRunner()

    def run(*arguments: object) -> Result:
        return runner.invoke(app, [str(a) for a in arguments])

    return run


def failure(result: Result, exit_code: int, code: str) -> dict[str, str]:
    """Check an expected failure printed with --json; return its parts."""
    assert result.exit_code == exit_code, result.output
    error = json.loads(result.stdout)["error"]
    assert error["code"] == code
    assert error["where"], "says where"
    assert error["hint"], "says what to do"
    assert "Traceback" not in result.output
    return error


@pytest.fixture
def damaged(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


def test_help_needs_no_backend_and_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['freewheel', '--help']\n"
        "from freewheel.cli import main\n"
        "try: main()\n"
        "except SystemExit as e: assert e.code in (0, None)\n"
        "heavy = {'torch', 'onnxruntime', 'openvino', 'diffusers'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    for command in ("build", "run", "inspect", "verify", "bench", "replay"):
        assert command in result.stdout


def test_run_makes_a_video_of_an_image_under_a_shipped_config(
    freewheel: Run, i2v_bundle: Bundle, first_frame: Path, tmp_path: Path
) -> None:
    out = tmp_path / "video.mp4"
    result = freewheel(
        "run", i2v_bundle.folder, "--prompt", "a red circle", "--image", first_frame, "--out", out,
        "--steps", 8, "--frames", 5, "--height", 64, "--width", 96, "--cache", "wan_i2v_ada", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["policy"] == "adacache"
    assert 0 < data["computed_steps"] < 8
    assert data["resolved"]["guidance_scale"] == 5
    assert iio.imread(out).shape == (5, 64, 96, 3)


def test_run_refuses_what_memory_cannot_hold_unless_told_otherwise(
    freewheel: Run, i2v_bundle: Bundle, first_frame: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("freewheel.compiler.fit.memory_available_bytes", lambda: 1000)
    out = tmp_path / "frame.png"
    arguments = (
        "run", i2v_bundle.folder, "--prompt", "a red circle", "--image", first_frame, "--out", out,
        "--steps", 1, "--frames", 1, "--height", 32, "--width", 32, "--json",
    )  # fmt: skip
    error = failure(freewheel(*arguments), 3, "request")
    assert "will not fit: " in error["message"]
    assert not out.exists()
    assert freewheel(*arguments, "--force").exit_code == 0
    assert out.exists()


def test_inspect_forecasts_a_checkpoint_before_it_is_built(
    freewheel: Run, i2v_checkpoint: Path
) -> None:
    result = freewheel(
        "inspect", i2v_checkpoint, "--frames", 9, "--height", 64, "--width", 96, "--backend", "openvino",
        "--config", "wan_i2v_custom_480p", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    forecast = json.loads(result.stdout)["forecast"]
    assert forecast["dims"]["tokens"] == 72
    assert forecast["memory"]["caches"]["wan_i2v_custom_480p"]["slots"] == 2
    assert forecast["memory"]["parts"]["VAE at work"] > 0
    text = freewheel("inspect", i2v_checkpoint, "--frames", 9, "--height", 64, "--width", 96)
    assert "residual history" in text.stdout
    assert "disk: " in text.stdout


def test_run_writes_a_video_and_says_what_it_did(
    freewheel: Run, demo_bundle: Bundle, tmp_path: Path
) -> None:
    out, trace = tmp_path / "video.mp4", tmp_path / "trace.npz"
    result = freewheel(
        "run", demo_bundle.folder, "--prompt", "a blue ring growing on a gray background", "--out", out,
        "--steps", 6, "--frames", 5, "--cache", "taylorseer", "--set", "interval=2",
        "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["policy"] == "taylorseer"
    assert data["branches"]["cond"]["computed"] == [True, False] * 3
    assert data["computed_steps"] == 3
    assert data["resolved"]["seed"] == 42, "from the bundle's default config"
    assert iio.imread(out).shape == (5, 96, 96, 3)
    result = freewheel(
        "run", demo_bundle.folder, "--prompt", "a blue ring", "--out", tmp_path / "video.gif", "--cache", "off",
        "--steps", 4, "--frames", 5, "--record", trace,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(tmp_path / "video.gif")
    result = freewheel("replay", trace, "--config", "taylorseer", "--set", "interval=2", "--json")
    assert json.loads(result.stdout)["computed_steps"] == 2


def test_run_says_when_a_policy_reused_nothing(
    freewheel: Run, demo_bundle: Bundle, tmp_path: Path
) -> None:
    result = freewheel(
        "run", demo_bundle.folder, "--prompt", "a ring", "--out", tmp_path / "v.png", "--frames", 1,
        "--steps", 3, "--cache", "teacache", "--set", "threshold=0", "--json",
    )  # fmt: skip
    warnings = json.loads(result.stdout)["warnings"]
    assert any("reused nothing" in w for w in warnings)
    assert any("few-step" in w for w in warnings)


def test_build_carries_the_pipelines_ends_where_asked(
    freewheel: Run, repository: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """Both flags reach the build; what it makes of them runs in `tests/cpp/test_frames.py`."""
    base = ["build", repository / "models" / "shapes_wan", "--out", tmp_path / "b"]
    base += ["--backend", "onnxruntime", "--config", "shapes_wan_off", "--dry-run", "--json"]
    flags = ["--with-text-encoder", "--with-vae"]
    counts = []
    for given in ([], flags[:1], flags[1:], flags):
        result = freewheel(*base, *given)
        assert result.exit_code == 0, result.output
        counts.append(json.loads(result.stdout)["graphs"])
    assert [c - counts[0] for c in counts] == [0, 1, 1, 2]
    open_size = [a if a != "shapes_wan_off" else "off" for a in base]
    assert "target_height" in failure(freewheel(*open_size, "--with-vae"), 3, "config")["hint"]
    bare = ["build", tiny_checkpoint, "--out", tmp_path / "b", "--backend", "onnxruntime", "--json"]
    error = failure(freewheel(*bare, "--with-text-encoder"), 3, "checkpoint")
    assert "bare transformer" in error["message"]


@pytest.mark.parametrize("how", ["missing", "truncated"])
def test_damaged_shards_are_one_error(
    freewheel: Run, damaged: Path, tmp_path: Path, how: str
) -> None:
    weights = damaged / "diffusion_pytorch_model.safetensors"
    if how == "missing":
        weights.unlink()
    else:
        weights.write_bytes(weights.read_bytes()[:-100])
    result = freewheel(
        "build", damaged, "--out", tmp_path / "b", "--backend", "onnxruntime", "--json"
    )
    error = failure(result, 3, "checkpoint")
    assert "diffusion_pytorch_model.safetensors" in error["message"]
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"], "nothing half-written is left"


def test_another_architecture_is_one_error(freewheel: Run, damaged: Path, tmp_path: Path) -> None:
    config = json.loads((damaged / "config.json").read_text())
    (damaged / "config.json").write_text(json.dumps({**config, "_class_name": "UNet2DModel"}))
    result = freewheel(
        "build", damaged, "--out", tmp_path / "b", "--backend", "onnxruntime", "--json"
    )
    error = failure(result, 3, "checkpoint")
    assert "'UNet2DModel'" in error["message"]
    assert "WanTransformer3DModel" in error["hint"]


def test_config_faults_are_reported_together(
    freewheel: Run, demo_bundle: Bundle, tmp_path: Path
) -> None:
    config = tmp_path / "bad.json"
    config.write_text(
        '{"feature_caching": "Tea", "teacache_thresh": "high", "infer_steps": 0, "sede": 1}'
    )
    result = freewheel("run", demo_bundle.folder, "--prompt", "x", "--out", tmp_path / "v.mp4",
                       "--config_json", config, "--json")  # fmt: skip
    error = failure(result, 3, "config")
    for part in ("teacache_thresh", "infer_steps", "sede", "seed"):
        assert part in error["message"]
    assert not (tmp_path / "v.mp4").exists()


def test_changed_bundle_is_refused(freewheel: Run, demo_bundle: Bundle, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(demo_bundle.folder, tmp_path / "bundle"))
    graph = copy / "graphs" / "block.onnx"
    graph.write_bytes(graph.read_bytes()[:-1])
    result = freewheel("run", copy, "--prompt", "x", "--out", tmp_path / "v.mp4", "--json")
    assert "graphs/block.onnx" in failure(result, 3, "bundle")["where"]
    result = freewheel("run", tmp_path, "--prompt", "x", "--out", tmp_path / "v.mp4", "--json")
    assert "manifest.json" in failure(result, 3, "bundle")["where"]


@pytest.mark.parametrize(
    ("arguments", "exit_code", "code", "says"),
    [
        (["--cache", "teacash"], 3, "config", "teacache"),
        (["--cache", "teacache", "--set", "treshold=1"], 3, "config", "threshold"),
        (["--cache", "teacache", "--set", "threshold=high"], 3, "config", "high"),
        (["--cache", "teacache", "--set", "threshold=-1"], 3, "config", "-1"),
        (["--set", "threshold"], 3, "config", "key=value"),
        (["--backend", "tensorrt"], 4, "backend", "tensorrt"),
        (["--backend", "cuda"], 3, "config", "cuda"),
        (["--steps", "0"], 3, "request", "--steps 0"),
        (["--height", "90"], 3, "request", "96"),
        (["--frames", "6"], 3, "request", "5"),
        (["--lora", "nothing.safetensors"], 3, "request", "nothing.safetensors"),
        (["--out", "/proc/video.mp4"], 1, "output", "/proc"),
        (["--out", "video.webm"], 1, "output", ".mp4"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_bad_requests_are_one_error(
    freewheel: Run, demo_bundle: Bundle, tmp_path: Path, arguments: list[str], exit_code: int,
    code: str, says: str,
) -> None:  # fmt: skip
    base = ["run", demo_bundle.folder, "--prompt", "x", "--json"]
    if "--out" not in arguments:
        base += ["--out", tmp_path / "v.mp4"]
    error = failure(freewheel(*base, *arguments), exit_code, code)
    assert says in f"{error['message']} {error['hint']}"
    assert not list(tmp_path.iterdir())


def test_usage_errors_exit_with_2(freewheel: Run) -> None:
    assert freewheel("run").exit_code == 2
    assert freewheel("build", "x", "--nonsense").exit_code == 2


def test_errors_without_json_go_to_stderr_as_one_message(freewheel: Run, tmp_path: Path) -> None:
    result = freewheel("replay", tmp_path / "no.npz", "--config", "teacache")
    assert result.exit_code == 3
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert "no.npz" in result.stderr


def test_replay_of_a_file_works_without_a_bundle(
    freewheel: Run, trace: Trace, tmp_path: Path
) -> None:
    trace.save(tmp_path / "t.npz")
    result = freewheel("replay", tmp_path / "t.npz", "--config", "shapes_wan_teacache", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["steps"] == 20


@pytest.mark.parametrize(
    ("keys", "form"),
    [
        ({}, "published forecast"),
        ({"trend": 0.65, "trend_decay": 0.8}, "damped forecast, trend 0.65, trend_decay 0.8"),
    ],
)
def test_summaries_say_which_form_of_the_law_ran(
    freewheel: Run, tmp_path: Path, keys: dict, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config, recorded = tmp_path / "mine.json", tmp_path / "trace.npz"
    config.write_text(json.dumps({"feature_caching": "Custom", "teacache_thresh": 0.5, **keys}))
    signal = np.linspace(1, 2, 12, dtype=np.float32)[:, None]
    arrays = {"timesteps": signal[:, 0], "branches": np.array(["cond"]), "cond/temb": signal}
    np.savez(recorded, **arrays, **{"cond/residual": signal[:, None]})
    told = freewheel("replay", recorded, "--config", config)
    assert told.stdout.startswith(f"custom ({form}): "), told.output
    told = freewheel("replay", recorded, "--config", config, "--json")
    assert json.loads(told.stdout)["form"] == form

    run = RunStatistics("custom", True, 2, {"cond": BranchStatistics()}, form=form)
    run.branches["cond"].add(True, None, [], 1.0)
    assert run.as_dict()["form"] == form
    _run_tables(Screen(), {**run.as_dict(), "measured_speedup": None})
    assert f"policy custom, {form} (folded" in " ".join(capsys.readouterr().err.split())
