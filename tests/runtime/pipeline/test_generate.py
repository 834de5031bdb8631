"""Requests: from a prompt, and an image where the model takes one, to latents and frames."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.hooks import CpuOffload
from diffusers import WanImageToVideoPipeline
from PIL import Image, ImageOps

from freewheel.bundle.manifest import GenerationDefaults
from freewheel.bundle.reader import Bundle
from freewheel.compiler.defaults import resolve_generation
from freewheel.core.errors import RequestError
from freewheel.policies.setting import CacheSetting
from freewheel.runtime.model import DeviceOptions
from freewheel.runtime.pipeline.attach import attach
from freewheel.runtime.pipeline.generate import Generator
from freewheel.runtime.pipeline.request import GenerationRequest, size_like
from freewheel.runtime.pipeline.schedulers import make_scheduler

PROMPT = "a red circle moving right"
SIZE = {"height": 64, "width": 96, "frames": 5}


@pytest.fixture(scope="module")
def maker(i2v_bundle: Bundle) -> Generator:
    return Generator(i2v_bundle)


DEFAULTS = resolve_generation(GenerationDefaults())


def request(image: Path | None, cache: CacheSetting | None = None, **options: Any) -> Any:
    given = {**SIZE, "steps": 8, "guidance_scale": 3.0, "seed": 5, "defaults": DEFAULTS, **options}
    return GenerationRequest(prompt=PROMPT, cache=cache or CacheSetting(), image=image, **given)


def test_a_value_is_the_requests_else_the_configs() -> None:
    plain = GenerationRequest(PROMPT, CacheSetting(), DEFAULTS)
    assert {n: plain.value(n) for n in DEFAULTS.model_dump()} == DEFAULTS.model_dump()
    assert GenerationRequest(PROMPT, CacheSetting(), DEFAULTS, steps=3).value("steps") == 3


def relative_l1(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().mean() / expected.abs().mean())


def plain_pipeline(checkpoint: Path) -> Any:
    pipe = WanImageToVideoPipeline.from_pretrained(checkpoint, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pipeline_latents(
    pipe: Any, image: Path, *, height: int, width: int, frames: int, guidance: float
) -> torch.Tensor:
    return pipe(
        ImageOps.fit(Image.open(image).convert("RGB"), (width, height)),
        PROMPT,
        negative_prompt="",
        height=height,
        width=width,
        num_frames=frames,
        num_inference_steps=8,
        output_type="latent",
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(5),
    ).frames


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
@pytest.mark.parametrize(
    ("height", "width", "frames", "guidance"), [(64, 96, 5, 3.0), (48, 32, 9, 1.0)]
)
def test_attached_image_to_video_gives_the_plain_pipelines_latents(
    i2v_bundle: Bundle,
    i2v_checkpoint: Path,
    first_frame: Path,
    backend: str,
    height: int,
    width: int,
    frames: int,
    guidance: float,
) -> None:
    size = {"height": height, "width": width, "frames": frames, "guidance": guidance}
    pipe = plain_pipeline(i2v_checkpoint)
    expected = pipeline_latents(pipe, first_frame, **size)
    transformer = attach(pipe, i2v_bundle, "off", backend=backend)
    assert relative_l1(pipeline_latents(pipe, first_frame, **size), expected) < 1e-4
    assert len(transformer.statistics.branches) == (2 if guidance > 1 else 1)
    assert transformer.statistics.computed_steps == 8


def test_a_request_gives_what_the_plain_pipeline_gives(
    maker: Generator, i2v_checkpoint: Path, first_frame: Path
) -> None:
    plain = plain_pipeline(i2v_checkpoint)
    expected = pipeline_latents(plain, first_frame, **SIZE, guidance=3.0)
    shift = {"flow_shift": plain.scheduler.config.flow_shift}
    result = maker.generate(request(first_frame, defaults=DEFAULTS.model_copy(update=shift)))
    assert relative_l1(result.latents, expected) < 1e-4
    assert result.frames.shape == (5, 64, 96, 3)
    assert result.frames.dtype == np.uint8


def test_an_offloaded_pipeline_brings_one_part_at_a_time_and_gives_the_same(
    maker: Generator, i2v_bundle: Bundle, first_frame: Path
) -> None:
    offloaded = Generator(i2v_bundle, options=DeviceOptions(offload=True))
    for part in ("text_encoder", "image_encoder", "vae"):
        assert isinstance(getattr(offloaded.pipe, part)._hf_hook, CpuOffload)
    expected = maker.generate(request(first_frame))
    for _ in range(2):
        found = offloaded.generate(request(first_frame))
        assert torch.equal(found.latents, expected.latents)
        np.testing.assert_array_equal(found.frames, expected.frames)


@pytest.mark.parametrize("sampler", ["distilled", "steps_1000_908.8427_713.9794", "lcm"])
def test_a_request_names_its_sampler_and_the_next_has_the_pipelines_own(
    maker: Generator, i2v_checkpoint: Path, first_frame: Path, sampler: str
) -> None:
    plain = plain_pipeline(i2v_checkpoint)
    plain.scheduler = make_scheduler(sampler, 5.0)
    steps = 3
    torch.manual_seed(5)
    expected = plain(
        ImageOps.fit(Image.open(first_frame).convert("RGB"), (96, 64)),
        PROMPT,
        negative_prompt="",
        height=64,
        width=96,
        num_frames=5,
        num_inference_steps=steps,
        output_type="latent",
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(5),
    ).frames
    own = maker.generate(request(first_frame)).latents
    few = {"sampler": sampler, "steps": steps, "flow_shift": 5.0, "guidance_scale": 1.0}
    torch.manual_seed(1)
    found = maker.generate(request(first_frame, **few))
    assert relative_l1(found.latents, expected) < 1e-4
    assert found.resolved["sampler"] == sampler
    assert torch.equal(maker.generate(request(first_frame)).latents, own)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sampler": "ddim"}, "--sampler ddim: is not known"),
        ({"flow_shift": 0.0}, "--shift 0.0: is no number above 0"),
        ({"guidance_scale_2": 3.0}, "--guidance-2 3.0: is given, and the bundle has one expert"),
        ({"guidance_scale_2": float("inf")}, "--guidance-2 inf: is not finite"),
    ],
)
def test_a_sampler_shift_or_second_guidance_that_can_not_be_is_refused(
    maker: Generator, first_frame: Path, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=re.escape(message)):
        maker.generate(request(first_frame, **given))


@pytest.mark.parametrize("policy", ["teacache", "taylorseer", "adacache", "custom"])
def test_policies_reuse_steps_of_image_to_video_and_leave_nothing_behind(
    maker: Generator, first_frame: Path, policy: str
) -> None:
    parameters: dict[str, Any] = {} if policy in ("taylorseer", "adacache") else {"threshold": 4.0}
    setting = CacheSetting(policy=policy, parameters=parameters)
    exact = maker.generate(request(first_frame)).latents
    cached = maker.generate(request(first_frame, setting))
    computed = cached.statistics.branches["cond"].computed
    assert computed[0]
    assert 0 < sum(computed) < 8
    assert not torch.equal(cached.latents, exact)
    assert torch.equal(maker.generate(request(first_frame)).latents, exact)


def test_the_image_reaches_the_model_and_another_one_is_noticed(
    maker: Generator, first_frame: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.png"
    ImageOps.invert(Image.open(first_frame)).save(other)
    first = maker.generate(request(first_frame)).latents
    second = maker.generate(request(other)).latents
    assert relative_l1(second, first) > 1e-3
    assert torch.equal(maker.generate(request(first_frame)).latents, first)


def test_a_video_takes_the_proportions_of_its_image(maker: Generator, first_frame: Path) -> None:
    area = resolve_generation(GenerationDefaults(height=64, width=96))
    asked = request(first_frame, height=None, width=None, frames=1, steps=1, defaults=area)
    values = maker.generate(asked).resolved
    # 100 x 80 pixels, at the area of 64 x 96.
    assert (values["height"], values["width"]) == (64, 80)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((832, 480), (480, 832)),
        ((480, 832), (832, 480)),
        ((64, 64), (624, 624)),
        ((4000, 2), (16, 28256)),
    ],
)
def test_sizes_follow_proportions(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert size_like(Image.new("RGB", size), 480 * 832, 16) == expected


def test_images_are_asked_for_where_they_belong(
    maker: Generator, generator: Generator, request_of: Any, first_frame: Path, tmp_path: Path
) -> None:
    missing = r"image: is missing: WanImageToVideoPipeline begins with one; give --image FILE"
    with pytest.raises(RequestError, match=missing):
        maker.generate(request(None))
    with pytest.raises(RequestError, match=r"--image: is nothing that WanPipeline takes, .* leave"):
        generator.generate(request_of(CacheSetting(), image=first_frame))
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    with pytest.raises(RequestError, match=r"broken\.png': can't be read: .*give a png or jpeg"):
        maker.generate(request(broken))
    with pytest.raises(RequestError, match=r"--image 'nowhere\.png': can't be read"):
        maker.timesteps(request(Path("nowhere.png")))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"steps": 0}, r"--steps 0: is outside \[1, 1000\]; use 20 to 50"),
        ({"steps": 1001}, "--steps 1001"),
        ({"seed": -1}, r"--seed -1: is outside \[0, 2\*\*63\); use --seed 42"),
        ({"seed": 2**63}, "--seed 9223372036854775808"),
        ({"guidance_scale": float("nan")}, "--guidance nan: is not finite; use 1 to 10"),
        ({"guidance_scale": float("-inf")}, "--guidance -inf"),
        ({"height": 40_000}, "--height 40000: is above 32768"),
        ({"frames": 40_001}, "--frames 40001"),
        ({"image": Path("nowhere.png")}, r"--image 'nowhere\.png': can't be read"),
    ],
    ids=str,
)
def test_values_that_no_model_takes_are_refused_before_a_step(
    generator: Generator, request_of: Any, options: dict[str, Any], says: str
) -> None:
    asked = request_of(CacheSetting(), **options)
    ran: list[int] = []
    for refuse in (
        asked.check,
        lambda: generator.timesteps(asked),
        lambda: generator.generate(asked, on_step=lambda done, total: ran.append(done)),
    ):
        with pytest.raises(RequestError, match=says):
            refuse()
    assert ran == []


def test_a_pipeline_that_takes_the_vae_for_another_is_refused(
    generator: Generator, request_of: Any, tmp_path: Path
) -> None:
    Image.new("RGB", (96, 96)).save(tmp_path / "in.png")
    wanted = replace(request_of(CacheSetting()), video=tmp_path / "in.png", strength=0.5)
    with pytest.raises(
        RequestError, match=r"vae_scale_factor_spatial: is 4, and WanPipeline has 8"
    ):
        generator.generate(wanted)


def test_the_largest_seed_runs(generator: Generator, request_of: Any) -> None:
    asked = request_of(CacheSetting(), steps=1, frames=1, seed=2**63 - 1)
    assert generator.generate(asked).resolved["seed"] == 2**63 - 1


def test_a_bundle_in_the_other_pipeline_is_refused(
    i2v_checkpoint: Path, tiny_bundle: Bundle
) -> None:
    pipe = plain_pipeline(i2v_checkpoint)
    own = pipe.transformer
    with pytest.raises(
        RequestError, match=r"transformer config '\w+': is .*, the bundle was built"
    ):
        attach(pipe, tiny_bundle, "off")
    assert pipe.transformer is own
