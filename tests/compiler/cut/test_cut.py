# SPDX-License-Identifier: Apache-2.0
"""The whole cut: calls in order, blocks that were not traced, blocks that must be."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from cases import EVERY_RUN, Case, case
from torch import Tensor, nn

from freewheel.compiler.cut.cut import cut_model
from freewheel.compiler.cut.prove import chain
from freewheel.compiler.cut.row import Row, prompt, step

ORDER = ("shape", "prompt", "run", "context", "modulation", "step", "block")


@pytest.mark.parametrize("name", EVERY_RUN)
def test_each_value_is_made_once_before_it_is_read(name: str) -> None:
    one = case(name)
    made = set(one.cut.inputs)
    for call in one.cut.calls:
        assert set(call.inputs) <= made, call
        assert made.isdisjoint(call.outputs), call
        made |= set(call.outputs)
    assert set(one.cut.results) <= made


@pytest.mark.parametrize("name", EVERY_RUN)
def test_what_runs_more_seldom_comes_first(name: str) -> None:
    cut = case(name).cut
    ranks = [ORDER.index(cut.segments[call.segment].runs) for call in cut.calls[:-1]]
    assert all(a <= b for a, b in pairwise(ranks))


def test_every_block_is_called_though_two_were_traced(wan: Case) -> None:
    calls = [call for call in wan.cut.calls if call.segment == "block"]
    assert [call.block for call in calls] == [f"blocks.{i}" for i in range(4)]
    assert calls[3].inputs == (
        *calls[2].inputs[:1],
        "blocks.2.hidden_states",
        *calls[2].inputs[2:4],
        "blocks.3.attn2_key",
        "blocks.3.attn2_value",
    )


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor, extra: Tensor) -> Tensor:
        return x + nn.functional.scaled_dot_product_attention(
            self.query(x), self.key(extra), self.value(extra)
        )


class Model(nn.Module):
    """Blocks of which each reads the first one's result too."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(4)])

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Model:
        return cls()

    def forward(self, x: Tensor, text: Tensor, return_dict: bool) -> Tensor:
        first = None
        for block in self.blocks:
            x = block(x, text if first is None else first)
            first = x if first is None else first
        return x + first


def test_blocks_that_others_cant_stand_for_are_all_traced() -> None:
    row = Row("Model", {"x": step("batch tokens 4"), "text": prompt("batch tokens 4")})
    cut = cut_model(row, Model, {})
    blocks = [call for call in cut.calls if call.block]
    assert [call.block for call in blocks] == [f"blocks.{i}" for i in range(4)]
    assert {call.inputs[-1] for call in blocks[1:]} == {"blocks.0.x"}
    model = Model()
    inputs = {"x": torch.randn(3, 5, 4), "text": torch.randn(3, 5, 4)}
    weights = dict(model.named_parameters())
    assert torch.allclose(chain(cut, weights, inputs)[0], model(**inputs, return_dict=False))
