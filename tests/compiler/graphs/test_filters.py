# SPDX-License-Identifier: Apache-2.0
"""The filtered latents: a product of matrices that is what a transform to frequencies gives."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from freewheel.bundle.reader import Bundle
from freewheel.compiler.cut.document import cut_of
from freewheel.compiler.graphs.filters import (
    FILTERED_LATENTS,
    BandFilter,
    filter_segments,
    signal_spec,
    signals_of,
)
from freewheel.core.tensor_spec import TensorSpec

SIZES = [(5, 12, 9), (1, 6, 7), (21, 4, 10)]
LEVELS = [1.0, 0.937, 0.5, 0.1, 0.0]


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def by_frequencies(latents: np.ndarray, sigma: float, power: int) -> np.ndarray:
    """Filter as the paper has it, in float64 over the axes behind the channels."""
    axes = tuple(range(2, latents.ndim))
    sigma = min(max(sigma, 1e-6), 1 - 1e-6)
    a, gain = 1 - sigma, np.ones([1] * latents.ndim)
    for axis in axes:
        size = latents.shape[axis]
        prior = 1 / (np.abs(np.fft.fftfreq(size)) ** power + 1e-16)
        shape = [size if i == axis else 1 for i in range(latents.ndim)]
        gain = gain * (a * prior / (a * a * prior + sigma**2)).reshape(shape)
    return np.fft.ifftn(np.fft.fftn(latents, axes=axes) * gain / gain.mean(), axes=axes).real


@pytest.mark.parametrize("sigma", LEVELS)
@pytest.mark.parametrize("size", SIZES)
def test_filter_is_the_gain_on_frequencies(size: tuple[int, ...], sigma: float) -> None:
    for latents, power in ((random(2, 3, *size), 3), (random(2, 3, *size[1:]), 2)):
        found = BandFilter(latents.ndim - 2, 3)(latents, torch.tensor([sigma])).numpy()
        expected = by_frequencies(latents.double().numpy(), sigma, power)
        np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("sigma", LEVELS[1:])
@pytest.mark.parametrize("size", SIZES)
def test_filter_is_that_of_diffusers_hook(size: tuple[int, ...], sigma: float) -> None:
    from diffusers.hooks.sea_cache import _apply_sea_filter

    latents = random(1, 3, *size)
    expected = _apply_sea_filter(latents[0].movedim(0, -1), sigma, 3.0).movedim(-1, 0)
    found = BandFilter(3, 3)(latents, torch.tensor([sigma]))[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-5 * float(expected.abs().max()))


def test_noise_hides_what_is_fine_and_leaves_what_is_coarse() -> None:
    x = torch.arange(32) / 32
    coarse, fine = (torch.cos(2 * torch.pi * k * x).expand(1, 1, 32, 32) for k in (1, 14))
    law = BandFilter(2, 1)
    kept = [float(law(c, torch.tensor([0.95])).norm() / c.norm()) for c in (coarse, fine)]
    assert kept[0] > 20 * kept[1]
    kept = [float(law(c, torch.tensor([0.001])).norm() / c.norm()) for c in (coarse, fine)]
    assert kept[0] == pytest.approx(kept[1], rel=1e-3)


def test_condition_beside_the_latents_is_no_part_of_the_signal() -> None:
    latents = random(1, 5, 4, 6)
    found = BandFilter(2, 3)(latents, torch.tensor([0.5]))
    assert found.shape == (1, 3, 4, 6)
    assert torch.equal(found, BandFilter(2, 3)(latents[:, :3], torch.tensor([0.5])))


def test_models_with_latents_on_a_grid_have_the_signal(tiny_bundle: Bundle) -> None:
    cut = cut_of(tiny_bundle)
    noise, band = filter_segments(cut)
    assert (noise.runs, band.runs) == ("run", "signal")
    grid = (4, "frames", "height", "width")
    assert signal_spec(cut, FILTERED_LATENTS).shape == ("batch", *grid)
    assert signals_of(cut)[FILTERED_LATENTS] == (FILTERED_LATENTS, "step")
    assert signal_spec(cut, "latents") == cut.signal_spec("latents")
    torch.testing.assert_close(
        noise.module(torch.tensor([1000.0, 250.0])), torch.tensor([[1.0], [0.25]])
    )
    tokens = TensorSpec("float32", ("batch", "tokens", 16))
    packed = replace(
        cut,
        inputs={
            "latents": cut.inputs["latents"].model_copy(
                update={"dtype": tokens.dtype, "shape": list(tokens.shape)}
            )
        },
    )
    assert filter_segments(packed) == ()
    assert FILTERED_LATENTS not in signals_of(packed)


def test_the_bundles_graphs_declare_it(tiny_bundle: Bundle) -> None:
    manifest = tiny_bundle.manifest
    assert manifest.signals[FILTERED_LATENTS].known == "step"
    assert list(manifest.graphs[FILTERED_LATENTS].inputs) == ["latents", "noise_level"]
    assert manifest.graphs["noise_level"].outputs["noise_level"].shape == ["steps", 1]
