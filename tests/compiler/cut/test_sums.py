# SPDX-License-Identifier: Apache-2.0
"""A sum of a timestep's part and a prompt's is two values, which each block adds itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import case, run, traced
from torch import Tensor, nn

from freewheel.compiler.cut.classes import classify
from freewheel.compiler.cut.cut import cut_model
from freewheel.compiler.cut.prove import chain
from freewheel.compiler.cut.row import Row, prompt, step
from freewheel.compiler.cut.row import run as timestep
from freewheel.compiler.cut.sums import split_sums
from freewheel.compiler.cut.tidy import tidy
from freewheel.compiler.cut.words import is_operation, tensors_read


def test_terms_are_grouped_by_what_they_depend_on() -> None:
    def forward(x: Tensor, t: Tensor, pooled: Tensor, guidance: Tensor) -> Tensor:
        return x + (pooled + t.sin() + guidance + t.cos())[:, None]

    found = traced(
        forward, x=step("batch 4"), t=timestep(), pooled=prompt("batch"), guidance=prompt("batch")
    )
    tidy(found)
    split_sums(found)
    classes = classify(found)
    (total,) = [
        node
        for node in found.graph.nodes
        if is_operation(node)
        and classes.of[node].every_step
        and "step" not in classes.of[node].on
        and len(tensors_read(node)) == 2
    ]
    assert [classes.runs(node) for node in tensors_read(total)] == ["run", "prompt"]
    inputs = {name: torch.randn(3) for name in ("t", "pooled", "guidance")}
    x = torch.randn(3, 4)
    assert torch.allclose(run(found, x=x, **inputs), forward(x, **inputs))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.scale = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor, temb: Tensor, tokens: Tensor) -> Tensor:
        x = x * self.scale(temb)[:, None]
        return x + nn.functional.scaled_dot_product_attention(
            self.query(x), self.key(tokens), self.value(tokens)
        )


class Model(nn.Module):
    """Blocks that read a vector and tokens, each of timestep and prompt."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.shared = nn.Linear(4, 4)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Model:
        return cls()

    def forward(self, x: Tensor, t: Tensor, text: Tensor, return_dict: bool) -> Tensor:
        wave = torch.outer(t, torch.tensor([1.0, 0.3, 0.1, 0.03])).sin()
        temb = nn.functional.silu(wave + text.mean(1))
        tokens = text * self.shared(temb)[:, None]
        for block in self.blocks:
            x = block(x, temb, tokens)
        return x


def test_products_and_tokens_of_both_are_made_once_a_computed_step_and_the_rest_in_blocks() -> None:
    row = Row(
        "Model",
        {"x": step("batch tokens 4"), "t": timestep(), "text": prompt("batch text_tokens 4")},
    )
    cut = cut_model(row, Model, {})
    first, *_ = (call for call in cut.calls if call.segment == "modulation")
    assert {
        cut.segments[c.segment].runs for c in cut.calls if set(c.outputs) & set(first.inputs)
    } == {"run", "prompt"}
    assert cut.segments["condition"].outputs == ("tokens",)
    assert cut.segments["condition"].runs == "block"
    model = Model()
    inputs = {"x": torch.randn(3, 5, 4), "t": torch.full((3,), 0.7), "text": torch.randn(3, 6, 4)}
    expected = model(**inputs, return_dict=False)
    assert torch.allclose(
        chain(cut, dict(model.named_parameters()), inputs)[0], expected, atol=1e-6
    )


@pytest.mark.parametrize("name", ["flux", pytest.param("sd3", marks=pytest.mark.nightly)])
def test_conditioning_is_a_table_and_a_value_of_the_prompt(name: str) -> None:
    cut = case(name).cut
    made = {o: cut.segments[call.segment].runs for call in cut.calls for o in call.outputs}
    calls = [c for c in cut.calls if cut.segments[c.segment].runs == "modulation"]
    calls += [c for c in cut.calls if c.segment == "finish"]
    for call in calls:
        assert [made[i] for i in call.inputs[:2]] == ["run", "prompt"], call
