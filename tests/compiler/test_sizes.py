# SPDX-License-Identifier: Apache-2.0
"""Pixels become tokens, with the scale factors of the pipeline's VAE."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from generations import generation_of

from freewheel.compiler.cut.declared import Cut
from freewheel.compiler.cut.models import family_of
from freewheel.compiler.sizes import branches_of, dims_of, latent_scale, shape_at, size_of
from freewheel.core.errors import RequestError
from freewheel.engines.base import TensorSpec

WAN = family_of("WanTransformer3DModel", "")
SMALL = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16}


@pytest.fixture(scope="module")
def cut(shared_cut: Callable[..., Cut]) -> Cut:
    return shared_cut(WAN, SMALL)


def test_what_is_asked_for_comes_before_the_config(cut: Cut) -> None:
    generation = generation_of(height=96, steps=30, guidance_scale=1.0)
    size = size_of(generation, steps=8)
    assert (size.height, size.width, size.steps) == (96, 832, 8)
    assert branches_of(cut, size) == 1
    assert branches_of(cut, size_of(generation, guidance=4.0)) == 2
    assert branches_of(cut, size_of(generation_of())) == 2


def test_guidance_inside_the_model_is_one_branch(shared_cut: Callable[..., Cut]) -> None:
    flux = shared_cut(
        family_of("FluxTransformer2DModel", ""),
        {
            "num_layers": 1,
            "num_single_layers": 1,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": 16,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 16,
            "guidance_embeds": True,
            "axes_dims_rope": [4, 6, 6],
        },
    )
    assert branches_of(flux, size_of(generation_of())) == 1
    assert branches_of(flux, size_of(generation_of(), true_guidance=4.0)) == 2


def test_wan_at_480p_has_the_tokens_that_its_authors_count(cut: Cut) -> None:
    dims = dims_of(cut, size_of(generation_of()), None)
    assert dims["tokens"] == 32_760
    assert dims["tokens_per_frame"] == 1_560
    assert (dims["frames"], dims["height"], dims["width"]) == (21, 60, 104)
    assert dims["image_tokens"] == 257


@pytest.mark.parametrize(
    ("model", "tokens"), [("clip_vision_model", 17), ("siglip_vision_model", 257)]
)
def test_scale_factors_are_the_pipelines_own(
    cut: Cut, tmp_path: Path, model: str, tokens: int
) -> None:
    for name, content in {
        "vae": {"scale_factor_temporal": 2, "scale_factor_spatial": 16},
        "image_encoder": {"model_type": model, "image_size": 64, "patch_size": 16},
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(content))
    size = size_of(generation_of(), height=64, width=96, frames=5)
    dims = dims_of(cut, size, tmp_path)
    assert (dims["frames"], dims["height"], dims["width"]) == (3, 4, 6)
    assert dims["tokens"] == 3 * 2 * 3
    assert dims["image_tokens"] == tokens


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"height": 1_000_000}, r"--height 1000000: is above 32768; give pixels, such as 480"),
        ({"frames": 40_001}, r"--frames 40001: is above 32768; give frames, such as 81"),
        (
            {"width": 16_400},
            r"--width 16400: is beyond the model's 2048 positions, module 'rope' .*; use 16384 at",
        ),
        ({"height": 100}, r"--height 100: is no multiple of 16; use 96"),
        ({"width": 8}, r"--width 8: is no multiple of 16; use 16"),
        ({"frames": 80}, r"--frames 80: is not 1 more than a multiple of 4; use 81"),
        ({"frames": 0}, r"--frames 0: .*; use 1"),
        ({"steps": 0}, r"--steps 0: is less than 1; use"),
    ],
)
def test_a_size_that_does_not_divide_is_refused(cut: Cut, wanted: dict, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        dims_of(cut, size_of(generation_of(), **wanted), None)


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"frames": 81}, r"--frames 81: is not 5 more than a multiple of 8: 2 latent .*; use 85"),
        ({"frames": 1}, r"--frames 1: .*; use 5"),
    ],
)
def test_frames_of_half_a_patch_are_refused(
    shared_cut: Callable[..., Cut], wanted: dict, said: str
) -> None:
    patched = shared_cut(WAN, {**SMALL, "patch_size": (2, 2, 2)})
    with pytest.raises(RequestError, match=said):
        dims_of(patched, size_of(generation_of(), **wanted), None)
    assert dims_of(patched, size_of(generation_of(), frames=5), None)["tokens"] == 1_560


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({}, (4, 8)),
        ({"scale_factor_spatial": 16, "scale_factor_temporal": None}, (4, 16)),
        ({"temporal_compression_ratio": 8, "spatial_compression_ratio": 32}, (8, 32)),
    ],
)
def test_a_latent_stands_for_what_the_vae_says(
    cut: Cut, tmp_path: Path, config: dict, found: tuple[int, int]
) -> None:
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config))
    scale = latent_scale(cut, tmp_path)
    assert (scale.frames, scale.pixels) == found
    assert latent_scale(cut, None) == latent_scale(cut, tmp_path / "nowhere")


def test_shapes_take_named_sizes() -> None:
    assert shape_at(TensorSpec("float32", ("batch", 6, "tokens")), {"batch": 2, "tokens": 9}) == (
        2,
        6,
        9,
    )
