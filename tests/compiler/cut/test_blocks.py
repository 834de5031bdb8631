# SPDX-License-Identifier: Apache-2.0
"""Blocks are found by module path, and grouped by what they compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from freewheel.compiler.cut.blocks import find_instances, find_templates
from freewheel.compiler.cut.row import Row, prompt, step
from freewheel.compiler.cut.tidy import tidy
from freewheel.compiler.cut.trace import Trace, trace


class Block(nn.Module):
    def __init__(self, *, scale: float = 1.0) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))
        self.register_buffer("scale", torch.tensor(scale), persistent=False)

    def forward(self, x: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        query, key, value = self.query(x), self.key(text), self.value(text)
        x = x + nn.functional.scaled_dot_product_attention(query, key, value) * self.scale
        return x, text + x.mean()


class Model(nn.Module):
    """A text refiner, two equal blocks, one with another constant, an embedder that is a list.

    What a block of another list makes is read by nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.ModuleList([nn.Linear(4, 8)])
        self.refine = nn.ModuleList([Block()])
        self.blocks = nn.ModuleList([Block(), Block(), Block(scale=2.0)])
        self.unread = nn.ModuleList([Block()])

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Model:
        return cls()

    def forward(self, x: Tensor, text: Tensor, return_dict: bool) -> Tensor:
        x = self.embed[0](x)
        text, _ = self.refine[0](text, text)
        self.unread[0](x, text)
        for block in self.blocks:
            x, text = block(x, text)
        return x


ROW = Row("Model", {"x": step("batch tokens 4"), "text": prompt("batch text_tokens 8")})


@pytest.fixture(scope="module")
def found() -> Trace:
    one = trace(ROW, Model, {}, whole=None)
    tidy(one)
    return one


def test_blocks_are_list_entries_that_attend_and_see_the_latents(found: Trace) -> None:
    blocks = [instance.block for instance in find_instances(found)]
    assert blocks == ["blocks.0", "blocks.1", "blocks.2"]


def test_equal_blocks_share_a_template_and_another_constant_does_not(found: Trace) -> None:
    templates = find_templates(found, find_instances(found))
    assert [[i.block for i in t.instances] for t in templates] == [
        ["blocks.0", "blocks.1"],
        ["blocks.2"],
    ]


def test_a_stream_that_the_last_block_alone_does_not_pass_on_stays_an_output(found: Trace) -> None:
    first, last = find_templates(found, find_instances(found))
    assert len(first.outputs) == 2
    assert len(last.outputs) == 1


def test_slots_are_what_a_block_reads_of_others(found: Trace) -> None:
    first, second, _ = find_instances(found)
    find_templates(found, [first, second])
    assert len(first.slots) == len(second.slots) == 2
    assert all(node in first.index for node in second.slots)
