# SPDX-License-Identifier: Apache-2.0
"""The layers that families are written in, against the modules they take their weights from."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention import FeedForward
from diffusers.models.embeddings import (
    TimestepEmbedding,
    Timesteps,
    apply_rotary_emb,
    get_1d_rotary_pos_embed,
)
from diffusers.models.normalization import AdaLayerNormZero, RMSNorm
from torch import nn

from freewheel.compiler.families.layers import (
    Sinusoid,
    embed,
    feed_forward,
    layer_norm,
    linear,
    merge_heads,
    modulate,
    modulation,
    rms_norm,
    rotate,
    set_weight_dtypes,
    split_heads,
)

X = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_linear_computes_in_the_dtype_asked_for(bias: bool, stored: torch.dtype) -> None:
    layer = nn.Linear(12, 7, bias=bias).to(stored)
    found = linear(layer, X, torch.float32)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, layer.float()(X))
    assert linear(layer, X, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "norm",
    [
        nn.RMSNorm(12, eps=1e-3),
        RMSNorm(12, eps=1e-3),
        RMSNorm(12, eps=1e-3, elementwise_affine=False),
    ],
    ids=["torch", "diffusers", "diffusers without weight"],
)
def test_rms_norm_takes_either_librarys_module(norm: nn.Module) -> None:
    if norm.weight is not None:
        nn.init.normal_(norm.weight)
    torch.testing.assert_close(rms_norm(norm, X), norm(X))
    assert rms_norm(norm.bfloat16(), X.bfloat16()).dtype == torch.float32


def test_layer_norm_may_be_absent() -> None:
    norm = nn.LayerNorm(12, eps=1e-3)
    nn.init.normal_(norm.weight)
    torch.testing.assert_close(layer_norm(norm, X), norm(X))
    assert layer_norm(nn.Identity(), X) is X


def test_sinusoid_and_embedder_are_those_of_timesteps() -> None:
    timesteps = torch.tensor([0.0, 1.0, 999.5])
    wave = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)(timesteps)
    assert torch.equal(Sinusoid()(timesteps), wave)
    embedder = TimestepEmbedding(256, 8)
    torch.testing.assert_close(embed(embedder, wave), embedder(wave))


def test_feed_forward_is_that_of_blocks() -> None:
    layers = FeedForward(12, activation_fn="gelu-approximate")
    torch.testing.assert_close(feed_forward(layers, X, torch.float32), layers(X))
    assert feed_forward(layers, X, torch.bfloat16).dtype == torch.float32


def test_modulation_is_made_of_the_vectors_wanted_alone() -> None:
    norm = AdaLayerNormZero(12)
    temb = X[:, 0]
    expected, gate, shift_mlp, scale_mlp, gate_mlp = norm(X, emb=temb)
    shift, scale, *others = modulation(norm.linear, temb, 6)
    torch.testing.assert_close(modulate(norm.norm, X, shift, scale), expected)
    for found, wanted in zip(others, (gate, shift_mlp, scale_mlp, gate_mlp), strict=True):
        torch.testing.assert_close(found.squeeze(1), wanted)
    few = modulation(norm.linear, temb, 6, used=2)
    assert len(few) == 2
    torch.testing.assert_close(few[1], scale)


def test_heads_are_split_and_merged_again() -> None:
    heads = split_heads(X, 3)
    assert heads.shape == (2, 3, 5, 4)
    assert torch.equal(heads[:, 1], X[..., 4:8])
    assert torch.equal(merge_heads(heads), X)


def test_rotation_is_that_of_diffusers() -> None:
    heads = split_heads(X, 3)
    cos, sin = get_1d_rotary_pos_embed(4, torch.arange(5), use_real=True)
    expected = apply_rotary_emb(heads, (cos, sin))
    found = rotate(heads, cos[None, :, ::2], sin[None, :, ::2])
    torch.testing.assert_close(found, expected)


def test_only_the_matrix_products_of_blocks_change_dtype() -> None:
    model = nn.ModuleDict(
        {
            "blocks": nn.ModuleList([nn.ModuleDict({"to_q": nn.Linear(2, 2), "norm": nn.LayerNorm(2)})]),
            "to_q": nn.Linear(2, 2),
        }
    )  # fmt: skip
    set_weight_dtypes(model, "float16", lambda n: "bfloat16", blocks=["blocks."], matmuls=["to_q"])
    assert {n: p.dtype for n, p in model.named_parameters()} == {
        "blocks.0.to_q.weight": torch.float16,
        "blocks.0.to_q.bias": torch.float16,
        "blocks.0.norm.weight": torch.bfloat16,
        "blocks.0.norm.bias": torch.bfloat16,
        "to_q.weight": torch.bfloat16,
        "to_q.bias": torch.bfloat16,
    }
