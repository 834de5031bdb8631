"""The command line: results on stdout, one message and the right exit code for every bad input."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from freewheel import __version__
from freewheel.bundle.reader import Bundle
from freewheel.cli import app, main
from freewheel.commands.run_outcome import show_outcome
from freewheel.commands.screen import Screen
from freewheel.core.extras import EXTRAS
from freewheel.engines import BACKENDS
from freewheel.runtime.pipeline.generate import Generator
from freewheel.runtime.statistics import BranchStatistics, RunStatistics
from freewheel.tuning.trace import Trace

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
    freewheel: Run,
    i2v_bundle: Bundle,
    first_frame: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "freewheel.compiler.forecast.memory_check.memory_available_bytes", lambda: 1000
    )
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


def test_a_lora_is_written_for_the_bundle_of_a_whole_pipeline(
    freewheel: Run, i2v_bundle: Bundle, tmp_path: Path
) -> None:
    shape = i2v_bundle.manifest.tensors["blocks.0.attn1.to_q.weight"].shape
    name = "transformer.blocks.0.attn1.to_q"
    state = {
        f"{name}.lora_A.weight": torch.ones(2, shape[1]),
        f"{name}.lora_B.weight": torch.ones(shape[0], 2),
    }
    save_file(state, tmp_path / "shared.safetensors")
    out = tmp_path / "loras" / "style.safetensors"
    arguments = ("lora", i2v_bundle.folder, f"{tmp_path / 'shared.safetensors'}:0.5", "--out", out)
    result = freewheel(*arguments, "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert (data["name"], data["weights"], data["bytes"]) == ("style", 1, out.stat().st_size)
    written = load_file(out)
    assert torch.equal(written[f"{name}.lora_B.weight"], torch.full((shape[0], 2), 0.5))
    error = failure(freewheel(*arguments[:-1], tmp_path / "style.bin", "--json"), 3, "request")
    assert "ends in .safetensors" in error["message"]


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


def test_inspect_draws_the_cut_of_a_config(freewheel: Run, tmp_path: Path) -> None:
    config = {
        "_class_name": "WanTransformer3DModel",
        "attention_head_dim": 12,
        "ffn_dim": 32,
        "freq_dim": 32,
        "in_channels": 4,
        "num_attention_heads": 2,
        "num_layers": 5,
        "out_channels": 4,
        "text_dim": 16,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = freewheel("inspect", tmp_path, "--cut", "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    (stage,) = data["stages"]
    assert (stage["first"], stage["count"], stage["context"]) == ("blocks.0", 5, "context")
    assert "block × 5" in data["mermaid"]
    refused = freewheel("inspect", tmp_path, "--cut", "--frames", 9)
    assert refused.exit_code == 3
    assert "takes no size" in refused.output


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


def test_run_takes_a_lora_at_its_scale(freewheel: Run, demo_bundle: Bundle, tmp_path: Path) -> None:
    file, generator = tmp_path / "lora.safetensors", torch.Generator().manual_seed(0)
    state = {}
    for name, entry in demo_bundle.manifest.tensors.items():
        if name.endswith(("to_q.weight", "to_v.weight")):
            rows, columns = entry.shape
            place = f"transformer.{name.removesuffix('.weight')}"
            state[f"{place}.lora_A.weight"] = torch.randn(4, columns, generator=generator)
            state[f"{place}.lora_B.weight"] = torch.randn(rows, 4, generator=generator)
    save_file(state, file)
    frames = []
    for given in ([], ["--lora", f"{file}:0"], ["--lora", file]):
        out = tmp_path / f"{len(frames)}.gif"
        result = freewheel(
            "run", demo_bundle.folder, "--prompt", "a blue ring", "--out", out, "--cache", "off",
            "--steps", 2, "--frames", 5, *given, "--json",
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        frames.append(iio.imread(out))
    assert np.array_equal(frames[0], frames[1])
    assert not np.array_equal(frames[0], frames[2])


def test_run_says_when_a_policy_reused_nothing(
    freewheel: Run, demo_bundle: Bundle, tmp_path: Path
) -> None:
    result = freewheel(
        "run", demo_bundle.folder, "--prompt", "a ring", "--out", tmp_path / "v.png", "--frames", 1,
        "--steps", 3, "--cache", "teacache", "--set", "threshold=0", "--json",
    )  # fmt: skip
    warnings = json.loads(result.stdout)["warnings"]
    assert len(warnings) == 1, "one cause"
    assert "few-step" in warnings[0]
    assert "reused nothing in branch 'cond' and 'uncond'" in warnings[0]


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
        (["--steps", "1001"], 3, "request", "[1, 1000]"),
        (["--seed", "-1"], 3, "request", "[0, 2**63)"),
        (["--seed", str(2**64)], 3, "request", "--seed 42"),
        (["--guidance", "nan"], 3, "request", "not finite"),
        (["--guidance", "inf"], 3, "request", "not finite"),
        (["--fps", "0"], 3, "request", "[1, 1000]"),
        (["--fps", "-5"], 3, "request", "[1, 1000]"),
        (["--height", "1000000"], 3, "request", "32768"),
        (["--image", "no.png"], 3, "request", "no.png"),
        (["--record-tokens", "0"], 3, "request", "--record-tokens 0"),
        (["--record", "/proc/t.npz"], 3, "output", "choose another --record"),
        (["--report", "/proc/t.html"], 3, "output", "choose another --report"),
        (["--record", "t.npz", "--report", "t.html"], 3, "request", "two runs"),
        (["--out", "/proc/video.mp4"], 3, "output", "/proc"),
        (["--out", "video.webm"], 3, "output", ".mp4"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_bad_requests_are_one_error(
    freewheel: Run,
    demo_bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    exit_code: int,
    code: str,
    says: str,
) -> None:
    monkeypatch.setattr(Generator, "generate", None)  # no request gets as far as a step
    base = ["run", demo_bundle.folder, "--prompt", "x", "--json"]
    if "--out" not in arguments:
        base += ["--out", tmp_path / "v.mp4"]
    error = failure(freewheel(*base, *arguments), exit_code, code)
    assert says in f"{error['message']} {error['hint']}"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["verify"], "freewheel verify: Missing argument"),
        (["run"], "freewheel run: Missing option '--out'"),
        (["build", "x", "--nonsense"], "No such option: --nonsense"),
        (["run", "x", "--prompt", "x", "--out", "v.mp4", "--fps", "many"], "'--fps'"),
        (["buidl"], "No such command 'buidl'"),
        (["build", "x", "--out", "b", "--workspace-mib", "-1"], "'--workspace-mib'"),
    ],
)
def test_usage_errors_exit_with_2_and_are_an_object_too(
    freewheel: Run, arguments: list[str], says: str
) -> None:
    plain = freewheel(*arguments)
    assert plain.exit_code == 2
    assert plain.stdout == ""
    assert "Usage: " in plain.stderr
    error = failure(freewheel(*arguments, "--json"), 2, "usage")
    assert says in error["message"]
    assert error["hint"].endswith("--help")


@pytest.mark.parametrize("option", [("--device", 0), ("--cuda-graphs",)])
@pytest.mark.parametrize("verb", ["run", "bench", "calibrate", "tune", "verify", "replay"])
def test_options_of_gpus_reach_the_engines_of_every_verb(
    freewheel: Run, demo_bundle: Bundle, tmp_path: Path, verb: str, option: tuple[object, ...]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n" * 3, encoding="utf-8")
    rest = {
        "run": ("--prompt", "a red circle", "--out", tmp_path / "video.mp4"),
        "bench": ("--prompt", "a red circle"),
        "calibrate": ("--prompts", prompts, "--out", tmp_path / "found.json"),
        "tune": ("--prompts", prompts, "--out", tmp_path / "tuned.json", "--target-speedup", 2),
        "verify": (),
        "replay": ("--prompts", prompts),
    }
    bundle = ("--suite", demo_bundle.folder) if verb == "replay" else (demo_bundle.folder,)
    result = freewheel(verb, *bundle, *rest[verb], *option, "--json")
    error = failure(result, 3, "request")
    backend = demo_bundle.manifest.engines[0].backend
    assert error["where"] == option[0]
    assert backend in error["message"]
    assert list(tmp_path.iterdir()) == [prompts]


def test_version_is_printed(freewheel: Run) -> None:
    result = freewheel("--version")
    assert (result.exit_code, result.stdout) == (0, f"freewheel {__version__}\n")


@pytest.mark.parametrize("option", ["--out", "--record", "--report"])
def test_a_folder_in_place_of_a_file_is_refused(
    freewheel: Run, demo_bundle: Bundle, tmp_path: Path, option: str
) -> None:
    folder = tmp_path / "v.mp4"
    folder.mkdir()
    base = ["run", demo_bundle.folder, "--prompt", "x", "--json", option, folder]
    base += [] if option == "--out" else ["--out", tmp_path / "video.mp4"]
    assert "is a folder, expected a file" in failure(freewheel(*base), 3, "output")["message"]
    assert list(tmp_path.rglob("*")) == [folder]


@pytest.mark.parametrize("option", ["--record", "--report"])
def test_one_file_is_not_written_twice(
    freewheel: Run, demo_bundle: Bundle, tmp_path: Path, option: str
) -> None:
    out = tmp_path / "v.mp4"
    base = ["run", demo_bundle.folder, "--prompt", "x", "--json", "--out", out, option, out]
    assert "is --out's file too" in failure(freewheel(*base), 3, "request")["message"]


def test_replicas_are_not_told_of_a_folder_of_this_machine(freewheel: Run, tmp_path: Path) -> None:
    refused = freewheel(
        "serve",
        tmp_path / "bundle",
        "--out",
        tmp_path / "models",
        "--lora-folder",
        tmp_path,
        "--replicas",
        2,
        "--json",
    )
    error = failure(refused, 3, "request")
    assert "which no replica sees" in error["message"]
    assert "'lora_folder' in config.pbtxt" in error["hint"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["calibrate", "bundle", "--prompts", "prompts.txt", "--out", "folder"],
        ["tune", "bundle", "--prompts", "prompts.txt", "--target-speedup", "2", "--out", "folder"],
        ["bench", "bundle", "--prompt", "x", "--report", "folder"],
        ["bench", "bundle", "--prompt", "x", "--out", "prompts.txt"],
        ["serve", "bundle", "--out", "prompts.txt"],
        ["build", "model", "--out", "prompts.txt", "--backend", "onnxruntime"],
        ["build", "model", "--out", "prompts.txt", "--backend", "onnxruntime", "--dry-run"],
        [
            "build",
            "model",
            "--out",
            "b",
            "--backend",
            "onnxruntime",
            "--dump-passes",
            "prompts.txt",
        ],
    ],
    ids=lambda v: " ".join((v[0], v[-2])),
)
def test_every_command_judges_its_outputs_before_it_works(
    freewheel: Run,
    demo_bundle: Bundle,
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
) -> None:
    (tmp_path / "bundle").symlink_to(demo_bundle.folder)
    (tmp_path / "model").symlink_to(tiny_checkpoint)
    (tmp_path / "folder").mkdir()
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    before = sorted(tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    for name in ("tuning.bench", "tuning.calibrate", "tuning.tune"):
        monkeypatch.setattr(f"freewheel.{name}.Generator", None)
    monkeypatch.setattr("freewheel.compiler.plan.open_checkpoint", None)
    failure(freewheel(*arguments, "--json"), 3, "output")
    assert sorted(tmp_path.iterdir()) == before


def test_a_tilde_is_expanded_in_every_path(
    freewheel: Run, trace: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    trace.save(tmp_path / "t.npz")
    (tmp_path / "c.json").write_text('{"feature_caching": "TaylorSeer"}')
    result = freewheel("replay", "~/t.npz", "--config=~/c.json", "--json")
    assert json.loads(result.stdout)["policy"] == "taylorseer"
    where = failure(freewheel("build", "~/no", "--out=~/b", "--json"), 3, "checkpoint")["message"]
    assert str(tmp_path / "no") in where
    assert not (tmp_path / "~").exists()


def test_an_interruption_names_the_command(
    freewheel: Run, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("freewheel.compiler.build.build", interrupt)
    arguments = ("build", tiny_checkpoint, "--out", tmp_path / "b", "--backend", "onnxruntime")
    error = failure(freewheel(*arguments, "--json"), 130, "failed")
    assert error["message"].startswith("build: was interrupted; run the same command again")


@pytest.mark.parametrize("as_json", [False, True])
def test_a_bug_of_ours_exits_with_70_and_its_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], as_json: bool
) -> None:
    arguments = ["freewheel", "build", "x", "--out", "b", *(["--json"] if as_json else [])]
    monkeypatch.setattr("sys.argv", arguments)
    handlers: dict[int, object] = {}
    monkeypatch.setattr("signal.signal", handlers.__setitem__)
    monkeypatch.setattr("freewheel.commands.build.backend_of", lambda *_, **__: 1 / 0)
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 70
    # A stopped command ends as an interrupted one does, with nothing half written.
    assert handlers == {signal.SIGTERM: signal.default_int_handler}
    shown = capsys.readouterr()
    assert "Traceback" in shown.err
    assert "ZeroDivisionError" in shown.err
    if as_json:
        assert json.loads(shown.out)["error"]["code"] == "bug"
    else:
        assert shown.out == ""


def test_debug_adds_the_traceback_of_an_expected_error(freewheel: Run, tmp_path: Path) -> None:
    result = freewheel("replay", tmp_path / "no.npz", "--config", "teacache", "--debug")
    assert result.exit_code == 3
    assert "Traceback" in result.stderr
    assert "error: " in result.stderr


@pytest.mark.parametrize(
    ("precision", "says"),
    [
        ("fp8", "a body of 8 bits or fewer is not built; use bfloat16 or float16"),
        ("bf16", "'bf16' is not known; use bfloat16"),
        ("float64", "'float64' is not known; use one of float32, bfloat16, float16"),
    ],
)
def test_a_precision_that_is_not_built_is_one_sentence(
    freewheel: Run, tmp_path: Path, precision: str, says: str
) -> None:
    for command in (["build", "x", "--out", tmp_path / "b"], ["inspect", tmp_path]):
        error = failure(freewheel(*command, "--precision", precision, "--json"), 3, "config")
        assert says in error["message"]


def test_tune_without_a_goal_says_which_there_are(freewheel: Run, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    arguments = ("tune", tmp_path, "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "c")
    error = failure(freewheel(*arguments, "--json"), 3, "request")
    assert error["message"].startswith("tune: has no goal; give one of --target-speedup")


def test_a_sweep_prints_its_table_on_stdout(freewheel: Run, trace: Trace, tmp_path: Path) -> None:
    trace.save(tmp_path / "t.npz")
    sweep = ("replay", tmp_path / "t.npz", "--config", "taylorseer", "--sweep", "interval=2,4")
    result = freewheel(*sweep)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("| value | computed |")
    assert len(result.stdout.splitlines()) == 4
    assert len(json.loads(freewheel(*sweep, "--json").stdout)["sweep"]) == 2


def test_a_speedup_is_called_measured_only_beside_an_uncached_run(
    freewheel: Run, demo_bundle: Bundle, tmp_path: Path
) -> None:
    base = ["run", demo_bundle.folder, "--prompt", "a ring", "--out", tmp_path / "v.png",
            "--frames", 1, "--steps", 4, "--set", "interval=2"]  # fmt: skip
    plain = freewheel(*base, "--cache", "taylorseer")
    assert plain.exit_code == 0, plain.output
    assert "estimated speedup" in plain.stderr
    assert "measured speedup" not in plain.stderr
    assert "steps/s" in plain.stderr
    assert "peak memory" in plain.stderr
    page = tmp_path / "r.html"
    data = json.loads(freewheel(*base, "--cache", "taylorseer", "--report", page, "--json").stdout)
    assert data["estimated_speedup"] > 0
    assert list(data["phase_seconds"]) == ["load", "encode", "denoise", "decode"]
    assert data["total_seconds"] == sum(data["phase_seconds"].values())
    assert data["steps_per_second"] == 4 / data["phase_seconds"]["denoise"]
    assert data["backend"] in BACKENDS
    assert data["peak_memory_bytes"] > 64 << 20
    told = f'["measured speedup of the denoise loop", "{data["measured_speedup"]:.2f}"]'
    text = page.read_text(encoding="utf-8")
    assert told in text
    assert '["policy", "taylorseer {\\"interval\\": 2, ' in text, (
        "of the run, not of the uncached one"
    )
    off = json.loads(freewheel(*base[:-2], "--cache", "off", "--json").stdout)
    assert (off["estimated_speedup"], off["measured_speedup"]) == (None, None)


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

    run = RunStatistics("custom", True, 2, {"cond": BranchStatistics(2)}, form=form)
    run.branches["cond"].add(0, True, None, [], 1.0)
    assert run.as_dict()["form"] == form
    whole = {
        "measured_speedup": None,
        "backend": "openvino",
        "phase_seconds": {"load": 1.0},
        "total_seconds": 1.0,
        "steps_per_second": None,
        "peak_memory_bytes": None,
    }
    show_outcome(Screen(), {**run.as_dict(), **whole})
    assert f"policy custom, {form} (folded" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("verb", "name", "key"),
    [("policies", "teacache", "policies"), ("configs", "wan_t2v_ada", "configs")],
)
def test_what_there_is_to_choose_from_is_shown(
    freewheel: Run, verb: str, name: str, key: str
) -> None:
    everything = freewheel(verb)
    assert everything.exit_code == 0
    assert name in everything.stdout
    one = json.loads(freewheel(verb, name, "--json").stdout)
    assert [entry["name"] for entry in one[key]] == [name]
    assert "known: " in failure(freewheel(verb, "no-such", "--json"), 3, "config")["hint"]


def test_doctor_prints_what_this_machine_can_do(freewheel: Run, tmp_path: Path) -> None:
    result = freewheel("doctor", "--folder", tmp_path, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["disk"]["folder"] == str(tmp_path)
    assert "backends" in freewheel("doctor").stdout


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        (("verify", "b"), "verify"),
        (("bench", "b"), "metrics"),
        (("bench", "b", "--out", "o"), "video"),
        (("tune", "b", "--prompts", "p", "--out", "o"), "metrics"),
        (("run", "b", "--prompt", "p", "--out", "v.mp4"), "video"),
        (("run", "b", "--prompt", "p", "--out", "v.gif", "--report", "r.html"), "report"),
    ],
)
def test_a_command_names_the_package_that_it_wants_before_it_reads_anything(
    freewheel: Run, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], extra: str
) -> None:
    lacking = set(EXTRAS[extra])
    monkeypatch.setattr(
        "freewheel.core.extras.find_spec", lambda name: None if name in lacking else name
    )
    error = failure(freewheel(*arguments, "--json"), 4, "dependency")
    assert all(package in error["message"] for package in (EXTRAS[extra][m] for m in lacking))
    assert error["hint"] == f"pip install 'freewheel[{extra}]'"


def test_videos_serves_the_bundle_where_it_was_asked_to(
    freewheel: Run, demo_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uvicorn = pytest.importorskip("uvicorn", reason="the extra 'videos' is not installed")
    testclient = pytest.importorskip("starlette.testclient", reason="httpx is not installed")
    served = []
    monkeypatch.setattr(uvicorn, "run", lambda app, **options: served.append((app, options)))
    arguments = ("videos", demo_bundle.folder, "--out", tmp_path / "v", "--port", 8123)
    failure_of_a_cache = freewheel(*arguments, "--cache", "teacach")
    assert failure_of_a_cache.exit_code == 3
    assert served == [], "refused before it listens"
    result = freewheel(*arguments, "--cache", "taylorseer")
    assert result.exit_code == 0, result.output
    ((app, options),) = served
    assert (options["host"], options["port"]) == ("127.0.0.1", 8123)
    assert "http://127.0.0.1:8123/v1" in result.stderr
    assert testclient.TestClient(app).get("/v1/videos").json()["data"] == []
    monkeypatch.setattr(
        "freewheel.compiler.forecast.memory_check.memory_available_bytes", lambda: 1000
    )
    refused = testclient.TestClient(app).post("/v1/videos", json={"prompt": "p"})
    assert refused.status_code == 400
    assert "will not fit" in refused.json()["error"]["message"]
    odd = testclient.TestClient(app).post("/v1/videos", json={"prompt": "p", "size": "49x32"})
    assert "is no multiple of" in odd.json()["error"]["message"], "before the run, not after"
    assert testclient.TestClient(app).get("/v1/videos").json()["data"] == []


def test_a_gpus_memory_is_foretold_where_there_is_none(freewheel: Run, repository: Path) -> None:
    asked = (
        "inspect",
        repository / "models" / "shapes_wan",
        "--backend",
        "tensorrt",
        "--precision",
        "bfloat16",
        "--json",
    )
    whole, less = (
        json.loads(freewheel(*asked, *more).stdout)["forecast"]["memory"]
        for more in ((), ("--offload",))
    )
    assert (whole["device"], less["device"]) == ("gpu", "gpu")
    assert less["needed_bytes"] < whole["needed_bytes"]
    assert failure(freewheel(*asked[:3], "tensort", "--json"), 3, "config")["hint"]
