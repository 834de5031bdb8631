# SPDX-License-Identifier: Apache-2.0
"""Operations counted on the meta device against formulas written out by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from freewheel.compiler.cut.declared import Cut
from freewheel.compiler.cut.models import family_of
from freewheel.compiler.forecast.flops import flops_of, segment_flops, step_flops

WAN = family_of("WanTransformer3DModel", "")

CHANNELS, FFN, TEXT, FREQUENCIES, LAYERS, LATENT = 32, 48, 24, 32, 3, 4
DIMS = {
    "batch": 1,
    "frames": 3,
    "height": 6,
    "width": 10,
    "tokens": 45,
    "tokens_per_frame": 15,
    "text_tokens": 7,
    "image_tokens": 9,
    "steps": 5,
}


@pytest.fixture(scope="module")
def tiny_cut(shared_cut: Callable[..., Cut]) -> Callable[..., Cut]:
    """Return a function that cuts the tiny Wan transformer, or one that differs from it."""
    tiny = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": LATENT,
        "out_channels": LATENT,
        "text_dim": TEXT,
        "freq_dim": FREQUENCIES,
        "ffn_dim": FFN,
        "num_layers": LAYERS,
        "rope_max_seq_len": 64,
        "patch_size": (1, 2, 2),
    }
    return lambda **config: shared_cut(WAN, {**tiny, **config})


def block_flops(tokens: int, batch: int = 1) -> int:
    """Six square products, two of the feed-forward, two attentions over tokens and over text."""
    products = 6 * CHANNELS * CHANNELS + 2 * CHANNELS * FFN
    attention = 2 * (tokens + DIMS["text_tokens"]) * CHANNELS
    return 2 * batch * tokens * (products + attention)


@pytest.fixture(scope="module")
def cut(tiny_cut: Callable[..., Cut]) -> Cut:
    return tiny_cut()


@pytest.mark.parametrize(("tokens", "batch"), [(45, 1), (45, 2), (7, 1)])
def test_a_block_is_its_products_and_its_two_attentions(cut: Cut, tokens: int, batch: int) -> None:
    dims = {**DIMS, "tokens": tokens, "batch": batch}
    for segment in (s for s in cut.segments if s.runs == "block"):
        assert flops_of(segment, dims) == block_flops(tokens, batch)


def test_every_other_segment_is_its_products(cut: Cut) -> None:
    counted = segment_flops(cut, DIMS, slots=3)
    text, tokens, patch = DIMS["text_tokens"], DIMS["tokens"], 4 * LATENT
    assert counted["prompt"] == 2 * text * (TEXT + CHANNELS) * CHANNELS
    assert counted["context"] == 2 * text * 2 * CHANNELS * CHANNELS
    per_step = (FREQUENCIES + CHANNELS + 6 * CHANNELS) * CHANNELS
    assert counted["timestep"] == 2 * DIMS["steps"] * per_step
    assert counted["head"] == counted["finish"] == 2 * tokens * patch * CHANNELS
    assert counted["reuse"] == 2 * 3 * tokens * CHANNELS
    assert counted["delta"] == counted["rotary"] == counted["modulate"] == 0


def test_a_computed_step_runs_every_block_and_a_reused_one_none(cut: Cut) -> None:
    flops = step_flops(cut, DIMS, slots=2)
    around = 2 * 2 * DIMS["tokens"] * 4 * LATENT * CHANNELS
    assert flops.computed == around + LAYERS * block_flops(DIMS["tokens"])
    assert flops.reused == around + 2 * 2 * DIMS["tokens"] * CHANNELS
    assert flops.prompt == flops.segments["prompt"] + LAYERS * flops.segments["context"]


def test_image_models_attend_to_the_image_too(tiny_cut: Callable[..., Cut]) -> None:
    """They pad the text to 512 tokens."""
    cut = tiny_cut(in_channels=36, out_channels=16, image_dim=20, added_kv_proj_dim=CHANNELS)
    counted = segment_flops(cut, DIMS)
    attended = DIMS["image_tokens"] + 512 - DIMS["text_tokens"]
    more = 2 * DIMS["tokens"] * 2 * attended * CHANNELS
    assert counted["block"] == block_flops(DIMS["tokens"]) + more


def test_real_sizes_cost_no_memory(shared_cut: Callable[..., Cut]) -> None:
    cut = shared_cut(WAN, {}, "bfloat16")  # of 14 billion parameters
    flops = step_flops(cut, {**DIMS, "tokens": 75_600, "frames": 21, "height": 90, "width": 160})
    assert flops.computed > 4e15
