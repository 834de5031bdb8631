"""The diffusers drop-in: a pipeline gives the same with a bundle in its transformer's place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from safetensors.torch import save_file

from freewheel.bundle.reader import Bundle
from freewheel.configs.errors import RequestError
from freewheel.runtime.attach import attach

PROMPT = "a red circle moving right on a gray background"


def load(repository: Path) -> Any:
    pipe = WanPipeline.from_pretrained(repository / "models" / "shapes_wan", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(
    pipe: Any, steps: int = 20, guidance: float = 3.0, size: int = 96, **options: Any
) -> torch.Tensor:
    return pipe(
        PROMPT, negative_prompt="", height=size, width=size, num_frames=5, num_inference_steps=steps,
        guidance_scale=guidance, max_sequence_length=16, output_type="latent",
        generator=torch.Generator().manual_seed(1), **options,
    ).frames  # fmt: skip


def relative_l1(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().mean() / expected.abs().mean())


@pytest.fixture(scope="module")
def plain(repository: Path) -> torch.Tensor:
    return latents(load(repository))


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_uncached_pipeline_gives_the_plain_pipelines_latents(
    demo_bundle: Bundle, repository: Path, plain: torch.Tensor, backend: str
) -> None:
    pipe = load(repository)
    transformer = attach(pipe, demo_bundle, "off", backend=backend)
    assert relative_l1(latents(pipe), plain) < 1e-4
    assert transformer.statistics.computed_steps == 20


def test_branches_steps_and_schedulers_follow_the_pipeline(
    demo_bundle: Bundle, repository: Path
) -> None:
    pipe = load(repository)
    transformer = attach(pipe, demo_bundle, "shapes_wan_taylorseer")
    first = latents(pipe, 10)
    assert set(transformer.statistics.branches) == {"cond", "uncond"}
    assert transformer.statistics.branches["cond"].computed == [True, False] * 5
    latents(pipe, 6, guidance=1.0, size=64)
    assert set(transformer.statistics.branches) == {"cond"}
    assert transformer.statistics.steps == 6
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    latents(pipe, 4)
    assert transformer.statistics.steps == 4
    pipe.scheduler = load(repository).scheduler
    assert torch.equal(latents(pipe, 10), first), "earlier runs leave nothing behind"


def test_an_interrupted_run_does_not_leak_into_the_next(
    demo_bundle: Bundle, repository: Path
) -> None:
    pipe = load(repository)
    attach(pipe, demo_bundle, "shapes_wan_custom")
    expected = latents(pipe, 8)

    def interrupt(
        pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]
    ) -> dict[str, Any]:
        if step == 3:
            raise KeyboardInterrupt
        return tensors

    with pytest.raises(KeyboardInterrupt):
        latents(pipe, 8, callback_on_step_end=interrupt)
    assert torch.equal(latents(pipe, 8), expected)


def test_pipelines_without_step_indices_are_followed_by_their_timesteps(
    demo_bundle: Bundle, repository: Path
) -> None:
    """Image-to-video pipelines name the branch only."""
    pipe = load(repository)
    transformer = attach(pipe, demo_bundle, "shapes_wan_taylorseer")
    expected = latents(pipe, 8)
    context = transformer.cache_context
    transformer.cache_context = lambda name, **where: context(name)  # type: ignore[method-assign]
    for _ in range(2):
        assert torch.equal(latents(pipe, 8), expected)


def test_lora_gives_what_diffusers_loader_gives(
    demo_bundle: Bundle, repository: Path, tmp_path: Path
) -> None:
    """Rank 16 on every projection of every block, through --lora and through the pipeline."""
    pipe = load(repository)
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, module in pipe.transformer.blocks.named_modules():
        if isinstance(module, torch.nn.Linear):
            down = torch.randn(16, module.in_features, generator=generator) * 0.05
            up = torch.randn(module.out_features, 16, generator=generator) * 0.05
            state[f"transformer.blocks.{name}.lora_A.weight"] = down
            state[f"transformer.blocks.{name}.lora_B.weight"] = up
    file = tmp_path / "lora.safetensors"
    save_file(state, file)
    unchanged = latents(pipe, 4)
    pipe.load_lora_weights(file)
    expected = latents(pipe, 4)
    assert relative_l1(expected, unchanged) > 0.01, "the LoRA matters"

    attached = load(repository)
    attach(attached, demo_bundle, "off", loras=[str(file)])
    assert relative_l1(latents(attached, 4), expected) < 1e-4
    attach(attached, demo_bundle, "off")
    attached.load_lora_weights(file)
    assert relative_l1(latents(attached, 4), expected) < 1e-4
    attach(attached, demo_bundle, "off", loras=[f"{file}:0"])
    assert relative_l1(latents(attached, 4), unchanged) < 1e-4


def test_wrong_loras_are_refused(demo_bundle: Bundle, repository: Path, tmp_path: Path) -> None:
    pipe = load(repository)
    with pytest.raises(RequestError, match=r"--lora 'missing.safetensors'.*is not a file.*give a"):
        attach(pipe, demo_bundle, "off", loras=["missing.safetensors"])
    file = tmp_path / "other.safetensors"
    down, up = torch.zeros(4, 99), torch.zeros(256, 4)
    module = "transformer.blocks.0.attn1.to_q"
    save_file({f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}, file)
    with pytest.raises(RequestError, match=r"module 'blocks.0.attn1.to_q'.*updates \[256, 99\]"):
        attach(pipe, demo_bundle, "off", loras=[str(file)])
    save_file(
        {"transformer.nowhere.lora_A.weight": down, "transformer.nowhere.lora_B.weight": up}, file
    )
    with pytest.raises(RequestError, match=r"1 of 1 modules are not in the model.*'nowhere'"):
        attach(pipe, demo_bundle, "off", loras=[str(file)])
