# SPDX-License-Identifier: Apache-2.0
"""Every cut, chained in PyTorch, is the transformer: at sizes beyond the traced ones, and at 1."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch
from cases import EVERY_RUN, Case, case, smallest
from held_out import HELD_OUT
from small_configs import CASES

from freewheel.compiler.cut.prove import (
    chain,
    eager,
    random_inputs,
    random_weights,
    relative_error,
)
from freewheel.compiler.cut.row import SIZES

TOLERANCE = 1e-5
"""Relative L2 in float32 (DESIGN 5)."""

OTHER = {
    "batch": 3,
    "frames": 5,
    "height": 6,
    "width": 4,
    "tokens": 17,
    "text_tokens": 19,
    "text_tokens_2": 21,
    "image_tokens": 7,
    "audio_tokens": 12,
    "rows": 6,
    "columns": 4,
}

NAMES = [
    pytest.param(name, marks=() if name in EVERY_RUN else pytest.mark.nightly)
    for name in (*CASES, *HELD_OUT)
]


def errors(one: Case, counts: dict[str, int], seed: int) -> list[float]:
    config: Any = one.model.config
    inputs = random_inputs(one.row, config, one.row.sizes(config, counts), seed=seed)
    expected = eager(one.row, one.model, inputs)
    found = chain(one.cut, one.weights, inputs)
    return [relative_error(a, b) for a, b in zip(found, expected, strict=True)]


@pytest.mark.parametrize("name", NAMES)
def test_a_chained_cut_is_the_transformer(name: str) -> None:
    one = case(name)
    for seed, counts in enumerate((SIZES, OTHER, smallest(one))):
        assert max(errors(one, counts, seed)) < TOLERANCE, counts


def test_a_wrong_weight_is_seen(wan: Case) -> None:
    name = "blocks.3.attn2.to_k.weight"  # of a block that was not traced
    weights = {**wan.weights, name: wan.weights[name] + 0.1}
    broken = Case(wan.row, wan.model, weights, lambda: wan.cut)
    assert max(errors(broken, SIZES, 0)) > TOLERANCE


def test_random_weights_leave_no_weight_out(wan: Case) -> None:
    again = random_weights(type(wan.model).from_config(wan.model.config))
    for name, weight in again.named_parameters():
        assert torch.equal(weight, wan.weights[name])
        assert float(weight.std()) > 0


def test_scales_of_norms_are_about_one_whatever_they_are_called() -> None:
    """Else queries and keys vanish, and the difference of two attentions is rounding alone."""
    model = random_weights(diffusers.StableAudio3DiTModel.from_config(CASES["stable_audio_3"][1]))
    scale = dict(model.named_parameters())["transformer_blocks.0.self_attn.q_norm.gamma"]
    assert 0.5 < float(scale.mean()) < 1.5


def test_a_model_is_compared_without_the_rounding_that_it_does_by_itself() -> None:
    """Kandinsky 5 rounds rotated queries and keys to bfloat16, of which the output moves by little."""
    one = case("kandinsky_5")
    config: Any = one.model.config
    inputs = random_inputs(one.row, config, one.row.sizes(config))
    (ours,) = eager(one.row, one.model, inputs)
    (rounded,) = eager(replace(one.row, patches=()), one.model, inputs)
    assert TOLERANCE < relative_error(ours, rounded) < 2e-3
