# SPDX-License-Identifier: Apache-2.0
"""Wan 2.2: two experts in one bundle, one set of engines, a switch by timestep, no shared cache."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from chain import randomised, relative
from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from generations import generation_of
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from freewheel.bundle.reader import MANIFEST, Bundle
from freewheel.cli import app
from freewheel.compiler.build import build
from freewheel.compiler.checkpoints.checkpoint import open_checkpoint
from freewheel.compiler.forecast.build import describe_plan
from freewheel.compiler.inspect import inspect_bundle
from freewheel.compiler.plan import plan
from freewheel.compiler.request import BuildRequest
from freewheel.compiler.sizes import size_of
from freewheel.compiler.verify.bundle import verify_bundle
from freewheel.core.errors import BundleError, CheckpointError, ConfigError, RequestError
from freewheel.engines import backend
from freewheel.runtime.lora import parse_lora
from freewheel.runtime.model import Model
from freewheel.runtime.pipeline.attach import attach
from freewheel.runtime.pipeline.write_lora import write_lora
from freewheel.runtime.session import Session
from freewheel.runtime.settings import config_entries

TINY = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 12,
    "freq_dim": 32,
    "ffn_dim": 24,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}
BOUNDARY = 0.875
SCHEDULER = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 5.0}


FORMS = {"linked": torch.float32, "converted": torch.bfloat16}
"""How the second expert's weights come into the bundle → the dtype in which they are stored."""


def write_checkpoint(folder: Path, form: str = "linked") -> Path:
    """Write a pipeline's folder with two transformers, the first in float32."""
    first, second = (randomised(WanTransformer3DModel(**TINY), seed) for seed in (1, 2))
    first.save_pretrained(folder / "transformer")
    second.to(FORMS[form]).save_pretrained(folder / "transformer_2")
    index = {
        "_class_name": "WanPipeline",
        "boundary_ratio": BOUNDARY,
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": ["diffusers", "WanTransformer3DModel"],
    }
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    scheduler = UniPCMultistepScheduler(**SCHEDULER)
    scheduler.save_pretrained(folder / "scheduler")
    return folder


@pytest.fixture(scope="module", params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def checkpoint(form: str, tmp_path_factory: Any) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("wan22"), form)


@pytest.fixture(scope="module")
def experts(checkpoint: Path) -> tuple[Any, Any]:
    return tuple(
        WanTransformer3DModel.from_pretrained(checkpoint / part).float().eval()
        for part in ("transformer", "transformer_2")
    )


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, build_bundle: Callable[..., Bundle]) -> Bundle:
    return build_bundle(checkpoint, ("onnxruntime",))


def test_forecasts_count_both_experts(checkpoint: Path, bundle: Bundle, tmp_path: Path) -> None:
    whole = inspect_bundle(bundle, height=32, width=48, frames=5, steps=4)
    assert whole["memory"]["experts"] == 2
    assert whole["memory"]["parts"]["weights"] == whole["tensors"]["bytes"]
    ahead = BuildRequest(
        model=str(checkpoint),
        out=tmp_path / "out",
        backends=[backend("onnxruntime")],
        configs=config_entries(["off"], lambda text: None),
    )
    size = size_of(generation_of(), height=32, width=48, frames=5, steps=4)
    planned = describe_plan(plan(ahead), size)["forecast"]
    assert planned["memory"]["parts"] == whole["memory"]["parts"]
    disk = planned["disk"]
    assert disk["linked_bytes"] + disk["converted_bytes"] == whole["tensors"]["bytes"]


def pipeline(experts: tuple[Any, Any], boundary: float | None = BOUNDARY) -> Any:
    scheduler = UniPCMultistepScheduler(**SCHEDULER)
    second = experts[1] if boundary is not None else None
    pipe = WanPipeline(None, None, None, scheduler, experts[0], second, boundary)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe: Any, steps: int, guidance: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, 1, 6, 12, generator=generator)
    found: torch.Tensor = pipe(
        prompt_embeds=states[0],
        negative_prompt_embeds=states[1],
        height=32,
        width=48,
        num_frames=5,
        num_inference_steps=steps,
        guidance_scale=guidance,
        guidance_scale_2=2.0,
        output_type="latent",
        generator=torch.Generator().manual_seed(1),
        return_dict=False,
    )[0]
    return found


def test_one_set_of_engines_serves_both_experts_weights(bundle: Bundle, form: str) -> None:
    manifest = bundle.manifest
    assert [(e.part, e.prefix, e.from_timestep) for e in manifest.experts] == [
        ("transformer", "", 875.0),
        ("transformer_2", "transformer_2.", 0.0),
    ]
    first = {n for n in manifest.tensors if not n.startswith("transformer_2.")}
    assert {f"transformer_2.{n}" for n in first} == manifest.tensors.keys() - first
    assert all("transformer_2" not in g for g in manifest.graphs)
    assert len({t.file for t in manifest.tensors.values()}) >= 2
    matrix = manifest.tensors["transformer_2.blocks.0.ffn.net.2.weight"]
    assert ("converted" in matrix.file) == (form == "converted")


def test_verify_reads_what_a_run_reads(bundle: Bundle, tmp_path: Path) -> None:
    """Every engine with the weights of each expert, and a tensor that no sampled block has."""
    report = verify_bundle(bundle)
    report.raise_on_mismatch()
    with_weights = {n for n, g in bundle.manifest.graphs.items() if g.weights}
    compared = {c.graph for c in report.engines}
    assert compared >= with_weights | {f"transformer_2.{n}" for n in with_weights}

    damaged = tmp_path / "bundle"
    shutil.copytree(bundle.folder, damaged, copy_function=os.link)
    name = "transformer_2.blocks.1.norm2.bias"
    manifest = json.loads((damaged / MANIFEST).read_text())
    manifest["tensors"][name]["offset"] += 4
    (damaged / MANIFEST).unlink()
    (damaged / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=rf"tensor '{name}': can't be read from"):
        verify_bundle(Bundle(damaged))


def test_each_expert_equals_its_transformer(bundle: Bundle, experts: tuple[Any, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    given = torch.randn(1, 16, 2, 4, 6, generator=generator)
    text = torch.randn(1, 7, 12, generator=generator)
    for index, model in enumerate(experts):
        session = Session(Model(bundle, "onnxruntime", expert=index))
        session.begin(torch.tensor([731.0]))
        session.set_prompt("cond", {"text_states": text})
        found = session.step("cond", 0, {"latents": given})
        with torch.no_grad():
            expected = model(given, torch.tensor([731.0]), text, return_dict=False)[0]
        assert relative(found, expected) < 1e-5, index


def test_a_lora_changes_the_expert_that_it_is_of(
    bundle: Bundle, checkpoint: Path, tmp_path: Path
) -> None:
    """As diffusers loads it, through --lora too, which is the same argument; and in a file for C++."""

    def loaded() -> Any:
        parts = ("transformer", "transformer_2")
        return pipeline(
            tuple(
                WanTransformer3DModel.from_pretrained(checkpoint / p).float().eval() for p in parts
            )
        )

    files = {}
    for seed, part in enumerate(("transformer", "transformer_2")):
        generator = torch.Generator().manual_seed(seed)
        files[part] = tmp_path / f"{part}.safetensors"
        pair = {
            f"transformer.blocks.0.attn1.to_q.lora_{side}.weight": torch.randn(
                *shape, generator=generator
            )
            for side, shape in (("A", (4, 24)), ("B", (24, 4)))
        }
        save_file(pair, files[part])
    plain, pipe = loaded(), loaded()
    plain.load_lora_weights(files["transformer"], adapter_name="a")
    plain.set_adapters("a", 0.5)
    high = latents(plain, 8)
    plain.load_lora_weights(files["transformer_2"], adapter_name="b", load_into_transformer_2=True)
    both = latents(plain, 8)
    assert relative(both, high) > 0.001
    given = [f"{files['transformer']}:0.5", f"transformer_2={files['transformer_2']}"]
    attach(pipe, bundle, "off", backend="onnxruntime", loras=given)
    assert relative(latents(pipe, 8), both) < 1e-4
    attach(pipe, bundle, "off", backend="onnxruntime", loras=given[:1])
    assert relative(latents(pipe, 8), high) < 1e-4
    out = tmp_path / "written.safetensors"
    write_lora(bundle, parse_lora(f"transformer_2={files['transformer_2']}:0.25"), out)
    written = load_file(out)
    assert {name.partition(".")[0] for name in written} == {"transformer_2"}
    up, down = (written[f"transformer_2.blocks.0.attn1.to_q.lora_{s}.weight"] for s in "BA")
    own = load_file(files["transformer_2"])
    theirs = [own[f"transformer.blocks.0.attn1.to_q.lora_{side}.weight"] for side in "BA"]
    assert torch.allclose(up @ down, 0.25 * theirs[0] @ theirs[1], atol=1e-5)


def test_the_pipeline_switches_and_no_cache_crosses(
    bundle: Bundle, experts: tuple[Any, Any]
) -> None:
    pipe = pipeline(experts)
    plain = {steps: latents(pipe, steps) for steps in (8, 11)}
    first = attach(pipe, bundle, "off", backend="onnxruntime")
    second = pipe.transformer_2.freewheel
    for steps, expected in plain.items():
        assert relative(latents(pipe, steps), expected) < 1e-4
        high = int((pipe.scheduler.timesteps >= 875).sum())
        assert 0 < high < steps
        assert (first.statistics.steps, second.statistics.steps) == (high, steps - high)
    first.use("taylorseer")
    assert second.setting == first.setting, "one choice for both"
    copied = copy.deepcopy(pipe)
    copied.transformer.freewheel.use("off")
    assert copied.transformer_2.freewheel.setting.policy == "off"
    assert second.setting.policy == "taylorseer", "a copy chooses for itself"
    cached = latents(pipe, 11)
    for transformer in (first, second):
        for branch in ("cond", "uncond"):
            computed = transformer.statistics.branches[branch].computed
            assert computed == [i % 4 == 0 for i in range(len(computed))], "begins its own history"
    assert torch.equal(latents(pipe, 11), cached)
    second.use("off")
    assert first.setting.policy == "taylorseer", "the second chooses for itself alone"


def test_another_length_after_an_interrupted_run(bundle: Bundle, experts: tuple[Any, Any]) -> None:
    """The second expert's first step of a longer run lies beyond the last of a shorter one."""
    pipe = pipeline(experts)
    attach(pipe, bundle, "taylorseer", backend="onnxruntime")
    expected = latents(pipe, 40)
    latents(pipe, 5)
    assert torch.equal(latents(pipe, 40), expected)


def test_pipelines_that_switch_elsewhere_are_refused(
    bundle: Bundle, experts: tuple[Any, Any], tiny_bundle: Bundle
) -> None:
    with pytest.raises(
        RequestError, match=r"'boundary_ratio'.*at timestep 900.0, the bundle at 875"
    ):
        attach(pipeline(experts, 0.9), bundle)
    with pytest.raises(RequestError, match=r"at timestep None, the bundle at 875"):
        attach(pipeline(experts, None), bundle)


@pytest.mark.parametrize("verb", ["run", "calibrate", "tune"])
def test_what_records_a_run_refuses_two_experts(bundle: Bundle, verb: str, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n", encoding="utf-8")
    out = tmp_path / ("video.mp4" if verb == "run" else "out.json")
    asked = {
        "run": ("--prompt", "a red circle", "--record", tmp_path / "trace.npz"),
        "calibrate": ("--prompts", prompts),
        "tune": ("--prompts", prompts, "--target-speedup", 2),
    }[verb]
    command = (verb, bundle.folder, *asked, "--out", out, "--json")
    done = CliRunner().invoke(app, [str(a) for a in command])
    assert done.exit_code == 3, done.output
    assert "has two transformers, and a recorded run is of one" in done.stdout
    assert list(tmp_path.iterdir()) == [prompts]


@pytest.mark.nightly
@pytest.mark.parametrize("form", FORMS, indirect=True)
def test_a_whole_pipeline_of_two_experts_is_built_verified_and_run(
    form: str, repository: Path, tmp_path: Path, build_cache: Path
) -> None:
    model, out = tmp_path / "model", tmp_path / "bundle"
    shutil.copytree(repository / "models" / "shapes_wan", model)
    shutil.copytree(model / "transformer", model / "transformer_2")
    index = json.loads((model / "model_index.json").read_text(encoding="utf-8"))
    index |= {"boundary_ratio": BOUNDARY, "transformer_2": index["transformer"]}
    (model / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    (weights,) = (model / "transformer_2").glob("*.safetensors")
    stored = load_file(weights)
    dtype = FORMS[form] if form == "converted" else None
    save_file({n: (t.float() * 1.01).to(dtype or t.dtype) for n, t in stored.items()}, weights)

    def freewheel(*arguments: object) -> Any:
        done = CliRunner().invoke(app, [str(a) for a in (*arguments, "--json")])
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    shared = ("--build-cache", build_cache)
    freewheel("build", model, "--out", out, "--backend", "onnxruntime", *shared)
    assert freewheel("verify", out)["ok"]
    video = tmp_path / "video.mp4"
    asked = ("run", out, "--prompt", "a red circle", "--steps", 8, "--frames", 5, "--out", video)
    told = freewheel(*asked)
    assert (told["steps"], told["computed_steps"]) == (8, 8)
    assert video.is_file()
    cached = freewheel(*asked, "--cache", "taylorseer", "--set", "interval=2")
    marks = cached["branches"]["cond"]["computed"]
    assert cached["steps"] == len(marks) == 8
    assert 4 <= sum(marks) <= 5, "both experts compute every other step"
    report = tmp_path / "report.html"
    freewheel(*asked, "--cache", "taylorseer", "--report", report)
    assert report.is_file()


def test_experts_of_two_geometries_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    for source in checkpoint.rglob("*"):
        if source.is_file():
            target = tmp_path / source.relative_to(checkpoint)
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(source.read_bytes())
    config = tmp_path / "transformer_2" / "config.json"
    config.write_text(config.read_text().replace('"ffn_dim": 24', '"ffn_dim": 32'))
    with pytest.raises(CheckpointError, match=r"transformer_2/config.json.*differs from the first"):
        open_checkpoint(str(tmp_path))


def test_engines_with_weights_inside_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    request = BuildRequest(
        model=str(checkpoint),
        out=tmp_path / "b",
        backends=[backend("onnxruntime")],
        configs=config_entries(["off"], print),
        weights="baked",
    )
    with pytest.raises(ConfigError, match=r"--weights baked.*this pipeline has two"):
        build(plan(request))
