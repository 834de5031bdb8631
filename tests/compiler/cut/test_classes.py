# SPDX-License-Identifier: Apache-2.0
"""Dependencies flow from inputs to results."""

from __future__ import annotations

from typing import Any

import torch
from cases import traced
from torch import Tensor, nn

from freewheel.compiler.cut.classes import classify
from freewheel.compiler.cut.cut import cut_model
from freewheel.compiler.cut.prove import chain
from freewheel.compiler.cut.row import Row, prompt, run, step
from freewheel.compiler.cut.tidy import tidy
from freewheel.compiler.cut.words import is_operation


def test_each_value_is_computed_as_seldom_as_it_can_be() -> None:
    def forward(x: Tensor, text: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        frequency = torch.arange(4) * 2
        positions = torch.arange(x.shape[1])
        embedded = torch.sin(t)
        folded = text.sum(1)
        placed = folded * x.shape[1]
        condition = embedded + folded.sum(-1)
        seen = x * 2
        return frequency, positions, embedded, folded, placed, condition, seen

    found = traced(
        forward, x=step("batch tokens 4"), text=prompt("batch text_tokens 4"), t=run("batch")
    )
    tidy(found)
    classes = classify(found, [])
    moments = ["constant", "shape", "run", "prompt", "prompt", "step", "step"]
    assert [classes.runs(node) for node in found.results] == moments


def test_the_sum_of_two_dependencies_has_both() -> None:
    found = traced(lambda x, text: x + text, x=step("batch 4"), text=prompt("batch 4"))
    classes = classify(found, [])
    (total,) = [node for node in found.graph.nodes if is_operation(node)]
    assert classes.of[total].on == {"step", "prompt"}


class Blocks(nn.Module):
    """Blocks that each have a constant of their own, and share another."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(4)])

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Blocks:
        return cls()

    def forward(self, x: Tensor, return_dict: bool) -> Tensor:
        shared = torch.arange(4).cos()
        for i, block in enumerate(self.blocks):
            x = block(x, torch.arange(4) * (i + 1), shared)
        return x


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor, own: Tensor, shared: Tensor) -> Tensor:
        return self.three(self.two(self.one(x) + own) * shared)


def test_a_constant_that_differs_from_block_to_block_is_a_value_and_others_are_not() -> None:
    row = Row("Blocks", {"x": step("batch tokens 4")}, whole=True)
    cut = cut_model(row, Blocks, {})
    assert len(cut.segments["block"].inputs) == 2
    assert cut.segments["prompt"].inputs == ()
    model = Blocks()
    x = torch.randn(3, 5, 4)
    with torch.no_grad():
        expected = model(x, return_dict=False)
    assert torch.allclose(chain(cut, dict(model.named_parameters()), {"x": x})[0], expected)
