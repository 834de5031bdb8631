# SPDX-License-Identifier: Apache-2.0
"""Configs worked out from shapes are those of the published models."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import pytest
import torch

from freewheel.compiler.checkpoints.geometry import (
    CLASSES,
    class_by_names,
    config_from_shapes,
)
from freewheel.core.errors import CheckpointError

PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "Wan 2.1 1.3B": (
        "WanTransformer3DModel",
        {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
    ),
    "Wan 2.1 14B": ("WanTransformer3DModel", {}),
    "Wan 2.1 14B image-to-video": (
        "WanTransformer3DModel",
        {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120},
    ),
    "Wan 2.2 A14B image-to-video": ("WanTransformer3DModel", {"in_channels": 36}),
    "FLUX.1 dev": ("FluxTransformer2DModel", {"guidance_embeds": True}),
    "FLUX.1 schnell": ("FluxTransformer2DModel", {}),
    "FLUX.1 Fill": (
        "FluxTransformer2DModel",
        {"guidance_embeds": True, "in_channels": 384, "out_channels": 64},
    ),
    "HunyuanVideo": ("HunyuanVideoTransformer3DModel", {}),
    "HunyuanVideo image-to-video": (
        "HunyuanVideoTransformer3DModel",
        {"in_channels": 33, "image_condition_type": "latent_concat", "guidance_embeds": False},
    ),
    "LTX-Video 2B": ("LTXVideoTransformer3DModel", {}),
    "LTX-Video 13B": (
        "LTXVideoTransformer3DModel",
        {"attention_head_dim": 128, "cross_attention_dim": 4096, "num_layers": 48},
    ),
    "Qwen-Image": ("QwenImageTransformer2DModel", {}),
    "Stable Diffusion 3 medium": (
        "SD3Transformer2DModel",
        {
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 192,
        },
    ),
    "Stable Diffusion 3.5 large": (
        "SD3Transformer2DModel",
        {
            "num_layers": 38,
            "num_attention_heads": 38,
            "caption_projection_dim": 2432,
            "pos_embed_max_size": 192,
            "qk_norm": "rms_norm",
        },
    ),
    "Stable Diffusion 3.5 medium": (
        "SD3Transformer2DModel",
        {
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 384,
            "qk_norm": "rms_norm",
            "dual_attention_layers": list(range(13)),
        },
    ),
    "Z-Image Turbo": ("ZImageTransformer2DModel", {}),
}


def shapes_of(name: str, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = getattr(diffusers, name)(**config)
    return {n: tuple(t.shape) for n, t in model.state_dict().items()}


@pytest.mark.parametrize("model", PUBLISHED)
def test_shapes_tell_the_config_of_a_published_model(model: str) -> None:
    name, config = PUBLISHED[model]
    shapes = shapes_of(name, config)
    assert class_by_names(shapes) == name
    taken = inspect.signature(getattr(diffusers, name).__init__).parameters
    expected = {n: p.default for n, p in taken.items() if n != "self"} | config
    found = config_from_shapes(name, shapes, "x.safetensors")
    assert found.pop("_class_name") == name
    assert {n: plain(v) for n, v in found.items()} == {n: plain(v) for n, v in expected.items()}


def plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def test_every_class_has_a_published_model() -> None:
    assert {name for name, _ in PUBLISHED.values()} == set(CLASSES)


WAN = (
    "WanTransformer3DModel",
    {"num_attention_heads": 3, "attention_head_dim": 32, "num_layers": 1},
)


def test_heads_that_nothing_tells_are_asked_for() -> None:
    shapes = shapes_of(*WAN)
    with pytest.raises(CheckpointError) as caught:
        config_from_shapes(WAN[0], shapes, "x.safetensors")
    assert caught.value.where == "x.safetensors"
    assert "is 96 wide, which is no published 'WanTransformer3DModel'" in caught.value.what
    assert "'config.json' beside it, or give --pipeline" in caught.value.hint
    told = config_from_shapes(WAN[0], shapes, "x.safetensors", heads=3)
    assert (told["num_attention_heads"], told["attention_head_dim"]) == (3, 32)


def test_a_tensor_that_a_rule_looks_at_and_misses_is_named() -> None:
    shapes = shapes_of(*WAN)
    del shapes["blocks.0.ffn.net.0.proj.weight"]
    with pytest.raises(CheckpointError, match=r"no usable tensor 'blocks.0.ffn.net.0.proj.weight'"):
        config_from_shapes(WAN[0], shapes, "x.safetensors")


def test_a_class_without_a_rule_is_told() -> None:
    with pytest.raises(CheckpointError, match="'BriaTransformer2DModel', whose config can't be"):
        config_from_shapes("BriaTransformer2DModel", {}, "x.safetensors")
