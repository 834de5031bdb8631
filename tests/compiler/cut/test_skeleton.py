# SPDX-License-Identifier: Apache-2.0
"""A model to trace has no weights, and few blocks."""

from __future__ import annotations

import torch
from diffusers import WanTransformer3DModel
from small_configs import WAN
from torch import nn

from freewheel.compiler.cut.skeleton import block_lists, skeleton


def test_two_blocks_stand_for_all_and_keep_their_names() -> None:
    model, runs = skeleton(WanTransformer3DModel, {**WAN, "num_layers": 30})
    assert list(model.blocks._modules) == ["0", "1"]
    assert runs == {"blocks.1": 29}


def test_a_different_block_is_kept() -> None:
    class Odd(WanTransformer3DModel):
        @classmethod
        def from_config(cls, config: dict[str, object]) -> nn.Module:
            model = WanTransformer3DModel.from_config(config)
            model.blocks[3].norm1.eps = 1e-3
            return model

    model, runs = skeleton(Odd, {**WAN, "num_layers": 8})
    assert list(model.blocks._modules) == ["0", "1", "3", "4", "5"]
    assert runs == {"blocks.1": 2, "blocks.5": 3}


def test_lists_can_be_left_whole() -> None:
    for whole in ({"blocks"}, None):
        model, runs = skeleton(WanTransformer3DModel, WAN, whole)
        assert len(model.blocks) == 4
        assert runs == {}


def test_weights_take_no_memory_and_tables_keep_their_values() -> None:
    model, _ = skeleton(WanTransformer3DModel, {**WAN, "num_layers": 2, "ffn_dim": 10**9})
    assert model.blocks[0].ffn.net[2].weight.shape[1] == 10**9
    real = WanTransformer3DModel.from_config(WAN)
    assert torch.equal(model.rope.freqs_cos, real.rope.freqs_cos)


def test_lists_inside_blocks_are_no_lists_of_blocks() -> None:
    model, _ = skeleton(WanTransformer3DModel, WAN)
    assert list(block_lists(model)) == ["blocks"]
