# SPDX-License-Identifier: Apache-2.0
"""Every node goes to the segment that its dependencies send it to."""

from __future__ import annotations

import torch
from cases import Case, case, traced
from torch import Tensor

from freewheel.compiler.cut.classes import classify
from freewheel.compiler.cut.models import run, step
from freewheel.compiler.cut.partition import partition
from freewheel.compiler.cut.tidy import tidy
from freewheel.compiler.cut.words import PRODUCTS, Segment, operation


def operations_of(segment: Segment) -> list[str]:
    nodes = segment.module.graph.nodes
    return [operation(node) for node in nodes if node.op == "call_function"]


def products_of(case: Case, segment: str) -> int:
    return sum(name in PRODUCTS for name in operations_of(case.cut.segments[segment]))


def test_wan_is_cut_where_the_hand_written_family_cut_it(wan: Case) -> None:
    runs = {name: segment.runs for name, segment in wan.cut.segments.items()}
    assert runs == {
        "constants": "build", "rotary": "shape", "prompt": "prompt", "timestep": "run",
        "context": "context", "head": "step", "block": "block", "finish": "step",
    }  # fmt: skip


def test_keys_and_values_of_the_prompt_are_context(wan: Case) -> None:
    assert products_of(wan, "context") == 2
    assert (
        products_of(wan, "block") == 4 + 2 + 2 + 2
    )  # attn1, attn2 without keys and values, ffn, sdpa
    assert "layer_norm" not in operations_of(wan.cut.segments["context"])


def test_flux_adds_the_prompt_to_the_timestep_every_step() -> None:
    cut = case("flux").cut
    assert cut.segments["condition"].runs == "condition"
    assert products_of(case("flux"), "timestep") > 0


def test_a_constant_of_the_batchs_size_stays_with_the_timestep() -> None:
    def forward(x: Tensor, t: Tensor) -> Tensor:
        return x + (t + torch.zeros(t.shape[0])).unsqueeze(-1)

    found = traced(forward, x=step("batch 4"), t=run("batch"))
    tidy(found)
    classes = classify(found, [])
    parts = partition(found, [], [], classes)
    assert [region.name for region in parts.regions] == ["timestep", "head"]
