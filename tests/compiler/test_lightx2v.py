# SPDX-License-Identifier: Apache-2.0
"""LightX2V's run commands, unchanged but for the program's name, on models in their layout."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from freewheel.bundle.files import CACHE
from freewheel.bundle.reader import Bundle
from freewheel.cli import app
from freewheel.compiler.engines import STORE
from freewheel.runtime.pipeline.schedulers import make_scheduler

sys.path.insert(0, str(Path(__file__).parent / "checkpoints"))

import originals
from authors import write_both

PROMPT, NEGATIVE = "a red circle moving right", "镜头晃动，色调艳丽"
SIZE = {"target_video_length": 5, "target_height": 32, "target_width": 48, "text_len": 16}
KERNELS = {
    "self_attn_1_type": "flash_attn3",
    "cross_attn_1_type": "flash_attn3",
    "cross_attn_2_type": "flash_attn3",
    "cpu_offload": False,
    "offload_granularity": "model",
}
BASE = {
    **SIZE,
    **KERNELS,
    "infer_steps": 4,
    "sample_guide_scale": 6,
    "sample_shift": 8,
    "enable_cfg": True,
}
LIST = [1000, 750, 500, 250]
DISTILLED = {**BASE, "sample_shift": 5, "enable_cfg": False, "denoising_step_list": LIST}
RATIOS = [1.0, 1.01, 0.99, 0.98]

RUNS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "wan_t2v": ("t2v", "wan2.1", BASE),
    "wan_i2v": ("i2v", "wan2.1", {**BASE, "sample_guide_scale": 5, "sample_shift": 3}),
    "wan_t2v_tea": (
        "t2v", "wan2.1",
        {**BASE, "feature_caching": "Tea", "coefficients": [[1.0, 0.0], [1.0, 0.0]],
         "use_ret_steps": False, "teacache_thresh": 0.26},
    ),
    "wan_i2v_mag": (
        "i2v", "wan2.1",
        {**BASE, "feature_caching": "Mag", "magcache_calibration": False, "magcache_K": 2,
         "magcache_thresh": 0.12, "magcache_retention_ratio": 0.2, "magcache_ratios": [RATIOS, RATIOS]},
    ),
    "wan_t2v_distill_model": ("t2v", "wan2.1_distill", {**DISTILLED, "dit_original_ckpt": "distilled.safetensors"}),
    "wan_t2v_distill_lora": (
        "t2v", "wan2.1_distill",
        {**DISTILLED, "lora_configs": [{"path": "lora.safetensors", "strength": 1.0}]},
    ),
    "wan_i2v_distill_fp8": (
        "i2v", "wan2.1_distill",
        {**DISTILLED, "dit_quantized": True, "dit_quantized_ckpt": "fp8.safetensors",
         "dit_quant_scheme": "fp8-sgl"},
    ),
    "wan_moe_t2v": (
        "moe_t2v", "wan2.2_moe",
        {**BASE, "sample_guide_scale": [4.0, 3.0], "sample_shift": 12.0, "boundary": 0.875,
         "t5_cpu_offload": False, "vae_cpu_offload": False},
    ),
    "wan_moe_i2v": (
        "moe_i2v", "wan2.2_moe",
        {**BASE, "sample_guide_scale": [3.5, 3.5], "sample_shift": 5.0, "boundary": 0.9,
         "use_image_encoder": False},
    ),
    "wan_moe_i2v_distill": (
        "moe_i2v", "wan2.2_moe_distill",
        {**DISTILLED, "sample_guide_scale": [3.5, 3.5], "boundary_step_index": 2,
         "use_image_encoder": False},
    ),
}  # fmt: skip
"""Config → model, ``--model_cls``, what it says: as those of their repository, but small."""

DAILY = ("wan_t2v_tea", "wan_t2v_distill_lora", "wan_i2v_distill_fp8", "wan_moe_t2v")
"""Runs that have every kind of file and task between them."""


def share_store(folder: Path, build_cache: Path) -> None:
    """Let what is built in a folder take the graphs of all tests."""
    (folder / CACHE).mkdir()
    (build_cache / STORE).mkdir(parents=True, exist_ok=True)
    (folder / CACHE / STORE).symlink_to(build_cache / STORE)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, build_cache: Path) -> Path:
    """A working folder with each model in both layouts, and the files that configs name."""
    folder = tmp_path_factory.mktemp("lightx2v")
    share_store(folder, build_cache)
    for kind, suffix in (
        ("t2v", ".pth"),
        ("i2v", ".safetensors"),
        ("moe_t2v", ".pth"),
        ("moe_i2v", ".pth"),
    ):
        write_both(kind, folder / f"{kind}_plain", folder / kind, suffix)
    state = originals.wan(_other(folder / "t2v_plain").state_dict())
    save_file(state, folder / "distilled.safetensors")
    image = originals.wan(_transformer(folder / "i2v_plain").state_dict())
    save_file(_fp8(image), folder / "fp8.safetensors")
    torch.manual_seed(2)
    lora = {}
    for name in ("blocks.0.self_attn.q", "blocks.1.ffn.0"):
        rows, columns = state[f"{name}.weight"].shape
        lora[f"diffusion_model.{name}.lora_down.weight"] = torch.randn(4, columns) * 0.3
        lora[f"diffusion_model.{name}.lora_up.weight"] = torch.randn(rows, 4) * 0.3
    save_file(lora, folder / "lora.safetensors")
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)
    Image.fromarray(pixels).resize((60, 40)).save(folder / "img_0.jpg")
    (folder / "configs").mkdir()
    for name in RUNS:
        data = said(name)
        (folder / "configs" / f"{name}.json").write_text(json.dumps(data, indent=4))
    return folder


def _transformer(plain: Path) -> Any:
    return WanTransformer3DModel.from_pretrained(plain / "transformer")


def _other(plain: Path) -> Any:
    """Return the same transformer with other weights."""
    torch.manual_seed(1)
    model = _transformer(plain)
    for parameter in model.parameters():
        parameter.data = parameter.data + 0.02 * torch.randn(parameter.shape)
    return model


def _fp8(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    out = {}
    for name, tensor in state.items():
        out[name] = tensor
        if tensor.ndim == 2 and name.startswith("blocks.") and name.endswith(".weight"):
            scale = tensor.abs().amax(dim=1, keepdim=True) / 448
            out[name] = (tensor / scale).to(torch.float8_e4m3fn)
            out[f"{name}_scale"] = scale
    return out


def said(name: str) -> dict[str, Any]:
    """Return a config; Wan 2.1 image-to-video takes texts of 512 tokens alone."""
    kind, _, data = RUNS[name]
    return {**data, "text_len": 512} if kind == "i2v" else data


def command(name: str, *more: str) -> list[str]:
    """Return the words after the program's name, in the order of LightX2V's scripts."""
    kind, model_cls, _ = RUNS[name]
    words = [
        "--model_cls", model_cls, "--task", kind[-3:], "--model_path", kind,
        "--config_json", f"configs/{name}.json", "--prompt", PROMPT,
        *(["--use_prompt_enhancer"] if name == "wan_t2v_distill_model" else []),
        "--negative_prompt", NEGATIVE,
        *(["--image_path", "img_0.jpg"] if kind.endswith("i2v") else []),
        "--save_result_path", f"save_results/{name}.png",
    ]  # fmt: skip
    return ["run", *words, *more]


def expected_frames(place: Path, name: str) -> np.ndarray[Any, Any]:
    """Return what the diffusers pipeline of the same model makes, by their schedule."""
    kind, model_cls, _ = RUNS[name]
    data = said(name)
    is_image = kind.endswith("i2v")
    pipeline: Any = WanImageToVideoPipeline if is_image else WanPipeline
    pipe = pipeline.from_pretrained(place / f"{kind}_plain", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    if name == "wan_t2v_distill_model":
        pipe.transformer = _other(place / "t2v_plain")
    if "lora" in name:
        pipe.load_lora_weights(str(place / "lora.safetensors"))
    is_listed = model_cls.endswith("_distill")
    sampler = "distilled" if is_listed else "unipc"
    pipe.scheduler = make_scheduler(sampler, data["sample_shift"])
    guidance = data["sample_guide_scale"] if data["enable_cfg"] else 1.0
    scales = guidance if isinstance(guidance, list) else [guidance, None]
    arguments: dict[str, Any] = {}
    if "moe" in kind:
        arguments["guidance_scale_2"] = scales[1]
    if is_listed and "moe" in kind:
        pipe.register_to_config(boundary_ratio=0.9)  # between 0.9375 and 0.8333
    if is_image:
        arguments["image"] = ImageOps.fit(Image.open(place / "img_0.jpg").convert("RGB"), (48, 32))
    frames = pipe(
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        height=32,
        width=48,
        num_frames=5,
        num_inference_steps=4,
        guidance_scale=scales[0],
        max_sequence_length=data["text_len"],
        output_type="np",
        generator=torch.Generator().manual_seed(42),
        **arguments,
    ).frames[0]
    return np.concatenate(list((frames * 255).round().astype(np.uint8)), axis=1)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in DAILY else pytest.mark.nightly) for n in RUNS],
)
def test_a_run_script_goes_to_the_end_unchanged(
    place: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(place)
    result = CliRunner().invoke(app, command(name, "--json", "--backend", "onnxruntime"))
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    found = np.asarray(Image.open(place / "save_results" / f"{name}.png")).astype(int)
    assert found.shape == (32, 5 * 48, 3)
    assert report["resolved"]["seed"] == 42
    if "feature_caching" in RUNS[name][2]:
        assert (
            report["policy"]
            == {"Tea": "teacache", "Mag": "magcache"}[RUNS[name][2]["feature_caching"]]
        )
        return
    expected = expected_frames(place, name).astype(int)
    # Rounding to whole values of a pixel; 8-bit weights are 2**-4 coarse, and a picture of theirs near.
    limit, mean = (60, 6.0) if "fp8" in name else (2, 0.05)
    assert np.abs(found - expected).max() <= limit
    assert np.abs(found - expected).mean() <= mean


def test_a_second_run_of_a_command_builds_nothing(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    runner = CliRunner()
    assert runner.invoke(app, command("wan_t2v", "--backend", "onnxruntime")).exit_code == 0
    bundles = {p: p.stat().st_mtime_ns for p in (place / "freewheel-cache" / "bundles").iterdir()}
    monkeypatch.setattr("freewheel.compiler.lightx2v.build", lambda *a: pytest.fail("built again"))
    done = runner.invoke(app, command("wan_t2v", "--backend", "onnxruntime", "--seed", "7"))
    assert done.exit_code == 0, done.output
    after = {p: p.stat().st_mtime_ns for p in (place / "freewheel-cache" / "bundles").iterdir()}
    assert after == bundles


def test_a_named_bundle_is_built_there_with_the_configs_list_of_steps(
    place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, build_cache: Path
) -> None:
    monkeypatch.chdir(place)
    share_store(tmp_path, build_cache)
    out = tmp_path / "bundle"
    words = command("wan_t2v_distill_model", "--backend", "onnxruntime")
    assert CliRunner().invoke(app, ["run", str(out), *words[1:]]).exit_code == 0
    manifest = Bundle(out).manifest
    assert list(manifest.configs) == ["wan_t2v_distill_model"]
    listed = [s for s in manifest.samplers if s.name == "steps_1000_750_500_250"]
    assert {(s.flow_shift, tuple(s.steps)) for s in listed} == {(3.0, (4,)), (5.0, (4,))}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: [*w, "--task", "i2v"], "--task i2v"),
        (lambda w: [*w, "--model_cls", "wan2.2_moe"], "has one transformer"),
        (lambda w: [*w, "--model_cls", "hunyuan3d"], "is not run here"),
        (lambda w: [*w, "--model_path", "t2v_plain"], "has neither the T5 encoder nor the VAE"),
        (lambda w: [x for x in w if x not in ("--model_path", "t2v")], "comes with --model_path"),
        (lambda w: [x for x in w if "config" not in x], "comes with a config"),
    ],
)
def test_a_command_that_can_not_be_followed_is_refused_before_anything_is_made(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[list[str]], list[str]],
    message: str,
) -> None:
    for name in ("t2v", "t2v_plain", "configs"):
        (tmp_path / name).symlink_to(place / name)
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, [*change(command("wan_t2v")), "--backend", "onnxruntime"])
    assert done.exit_code in (2, 3), done.output
    assert message in " ".join(done.output.split())
    assert not (tmp_path / "freewheel-cache").exists()
    assert not (tmp_path / "save_results").exists()


def test_build_takes_an_authors_folder_whole(
    place: Path, tmp_path: Path, build_cache: Path
) -> None:
    share_store(tmp_path, build_cache)
    out = tmp_path / "bundle"
    words = ["build", str(place / "moe_t2v"), "--out", str(out), "--backend", "onnxruntime"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    manifest = Bundle(out).manifest
    assert manifest.pipeline.folder == "pipeline"
    assert [e.from_timestep for e in manifest.experts] == [875.0, 0.0]
    kept = {p.name for p in (out / "pipeline").iterdir()}
    assert {"text_encoder", "tokenizer", "vae", "scheduler"} <= kept


def test_flags_of_lightx2v_without_its_model_are_refused(tmp_path: Path) -> None:
    for flag in (["--task", "i2v"], ["--model_cls", "wan2.2_moe"], ["--use_prompt_enhancer"]):
        done = CliRunner().invoke(
            app, ["run", str(tmp_path), "--prompt", "a", "--out", str(tmp_path / "a.png"), *flag]
        )
        assert "comes with --model_path" in " ".join(done.output.split())


def test_the_writer_of_8_bits_is_that_of_lightx2v(place: Path) -> None:
    state = load_file(place / "fp8.safetensors")
    assert state["blocks.0.ffn.0.weight"].dtype == torch.float8_e4m3fn
    assert state["blocks.0.ffn.0.weight_scale"].shape == (48, 1)
