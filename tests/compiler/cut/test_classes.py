# SPDX-License-Identifier: Apache-2.0
"""Dependencies flow from inputs to results."""

from __future__ import annotations

import torch
from cases import traced
from torch import Tensor

from freewheel.compiler.cut.classes import classify
from freewheel.compiler.cut.models import prompt, run, step
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
    moments = ["build", "shape", "run", "prompt", "prompt", "step", "step"]
    assert [classes.runs(node) for node in found.results] == moments


def test_the_sum_of_two_dependencies_has_both() -> None:
    found = traced(lambda x, text: x + text, x=step("batch 4"), text=prompt("batch 4"))
    classes = classify(found, [])
    (total,) = [node for node in found.graph.nodes if is_operation(node)]
    assert classes.of[total].on == {"step", "prompt"}
