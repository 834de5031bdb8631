# SPDX-License-Identifier: Apache-2.0
"""Whole runs from a prompt to frames: what a GPU gives beside what the CPU reference gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from gpu_report import Report

from freewheel.bundle.reader import Bundle
from freewheel.policies.setting import CacheSetting
from freewheel.runtime.model import DeviceOptions
from freewheel.runtime.pipeline.generate import Generation, Generator
from freewheel.runtime.pipeline.request import GenerationRequest
from freewheel.tuning.quality import compare_videos

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

PROMPT = "a green square moving up on a black background"
SETTINGS: Mapping[str, CacheSetting] = {
    "off": CacheSetting(),
    "teacache": CacheSetting(policy="teacache", parameters={"threshold": 0.3}),
    "teacache on modulated_input": CacheSetting(
        policy="teacache", signal="modulated_input", parameters={"threshold": 0.3}
    ),
    "taylorseer": CacheSetting(policy="taylorseer", parameters={"interval": 3}),
    "adacache": CacheSetting(policy="adacache"),
    "custom": CacheSetting(policy="custom", parameters={"threshold": 0.3}),
}
COLUMNS = ("engines", "body", "setting", "computed", "latents, relative L1", "PSNR of frames, dB")
LATENT_TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
"""Relative L1 after 12 steps. float32 as two CPU engines are held to; others are what rounding gives."""


def generate(
    generator: Generator, setting: CacheSetting, defaults: Any, **options: Any
) -> Generation:
    request = GenerationRequest(
        prompt=PROMPT, cache=setting, defaults=defaults, steps=12, frames=9, seed=1, **options
    )
    return generator.generate(request)


@pytest.fixture(scope="module")
def expected(demo_bundle: Bundle) -> Callable[[str], Generation]:
    """Return a function that runs a setting in float32 on ONNX Runtime, once."""
    generator = Generator(demo_bundle, backend="onnxruntime")
    defaults = demo_bundle.manifest.configs["shapes_wan_off"].generation
    made: dict[str, Generation] = {}

    def make(name: str) -> Generation:
        if name not in made:
            made[name] = generate(generator, SETTINGS[name], defaults)
        return made[name]

    return make


@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_decides_and_ends_as_on_the_cpu(
    engines: str, demo: Callable[..., Bundle], expected: Any, report: Report, name: str
) -> None:
    bundle, wanted = demo(), expected(name)
    defaults = bundle.manifest.configs["shapes_wan_off"].generation
    found = generate(Generator(bundle), SETTINGS[name], defaults)
    tell(report, engines, "float32", name, found, wanted)
    for branch, statistics in wanted.statistics.branches.items():
        assert found.statistics.branches[branch].computed == statistics.computed
    assert distance(found, wanted) < LATENT_TOLERANCE["float32"]


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_a_low_precision_run_ends_near_the_float32_one(
    engines: str, demo: Callable[..., Bundle], expected: Any, report: Report, precision: str
) -> None:
    bundle, wanted = demo(precision), expected("off")
    defaults = bundle.manifest.configs["shapes_wan_off"].generation
    found = generate(Generator(bundle), SETTINGS["off"], defaults)
    tell(report, engines, precision, "off", found, wanted)
    assert distance(found, wanted) < LATENT_TOLERANCE[precision]


def test_one_session_serves_sizes_guidance_and_policies_in_turn(
    engines: str, demo: Callable[..., Bundle]
) -> None:
    bundle = demo()
    defaults = bundle.manifest.configs["shapes_wan_off"].generation
    shared = Generator(bundle)
    for name, options in (
        ("taylorseer", {"guidance_scale": 3.0}),
        ("adacache", {"guidance_scale": 1.0}),
        ("off", {"guidance_scale": 3.0}),
    ):
        alone = generate(Generator(bundle), SETTINGS[name], defaults, **options)
        found = generate(shared, SETTINGS[name], defaults, **options)
        assert np.array_equal(found.latents.cpu(), alone.latents.cpu()), name


@pytest.mark.parametrize("name", ["off", "taylorseer", "adacache"])
def test_offloaded_weights_give_the_same(
    engines: str, demo: Callable[..., Bundle], name: str
) -> None:
    bundle = demo()
    defaults = bundle.manifest.configs["shapes_wan_off"].generation
    offloading = Generator(bundle, options=DeviceOptions(offload=True))
    found = generate(offloading, SETTINGS[name], defaults)
    resident = generate(Generator(bundle), SETTINGS[name], defaults)
    assert np.array_equal(found.latents.cpu(), resident.latents.cpu())


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("weights", ["inputs", "baked"])
def test_cuda_graphs_give_the_same(
    engines: str, demo: Callable[..., Bundle], name: str, weights: str
) -> None:
    bundle = demo(weights=weights)
    defaults = bundle.manifest.configs["shapes_wan_off"].generation
    captured = Generator(bundle, options=DeviceOptions(cuda_graphs=True))
    found = generate(captured, SETTINGS[name], defaults)
    plain = generate(Generator(bundle), SETTINGS[name], defaults)
    assert np.array_equal(found.latents.cpu(), plain.latents.cpu())


def distance(found: Generation, wanted: Generation) -> float:
    a, b = found.latents.cpu().float(), wanted.latents.cpu().float()
    return float((a - b).abs().mean() / b.abs().mean())


def tell(
    report: Report, engines: str, precision: str, name: str, found: Generation, wanted: Generation
) -> None:
    quality = compare_videos(found.frames, wanted.frames)
    steps = found.statistics
    psnr = "equal" if quality.psnr is None else f"{quality.psnr:.1f}"
    row = [
        engines,
        precision,
        name,
        f"{steps.computed_steps:g} of {steps.steps}",
        f"{distance(found, wanted):.1e}",
        psnr,
    ]
    report.table("Runs against ONNX Runtime in float32 on the CPU", COLUMNS, [row])
