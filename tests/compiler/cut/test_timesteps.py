# SPDX-License-Identifier: Apache-2.0
"""A timestep is a table of the run where what runs at each step reads it itself, and nowhere else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from cases import run, traced
from torch import Tensor, nn

from freewheel.compiler.cut.cut import cut_model
from freewheel.compiler.cut.prove import chain, random_weights
from freewheel.compiler.cut.row import Row, prompt, step
from freewheel.compiler.cut.row import run as timestep
from freewheel.compiler.cut.tidy import tidy
from freewheel.compiler.cut.timesteps import tabulate_timesteps
from freewheel.compiler.cut.words import is_operation, operation


class Embedding(nn.Module):
    """Each block embeds the timestep and a vector of the prompt with weights of its own."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.query, self.key = nn.Linear(1, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor, t: Tensor, pooled: Tensor) -> Tensor:
            scaled = x * (self.embed(t.unsqueeze(1)) + pooled).unsqueeze(1)
            query, key = self.query(scaled), self.key(scaled)
            return x + nn.functional.scaled_dot_product_attention(query, key, scaled)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([self.Block() for _ in range(4)])

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Embedding:
        return cls()

    def forward(self, x: Tensor, t: Tensor, pooled: Tensor, *, return_dict: bool) -> Tensor:
        hidden, vector = x.sin(), pooled.tanh()
        for block in self.blocks:
            hidden = block(hidden, t, vector)
        return hidden * t.sin().unsqueeze(-1).unsqueeze(-1)


def test_a_block_that_embeds_the_timestep_reads_its_steps_row() -> None:
    inputs = {"x": step("batch tokens 4"), "t": timestep(), "pooled": prompt("batch 4")}
    model = random_weights(Embedding())
    cut = cut_model(Row("Embedding", inputs), Embedding, {})
    readers = {call.segment for call in cut.calls if "t" in call.inputs}
    assert readers == {"timestep"}
    embeds = [call for call in cut.calls if cut.segments[call.segment].runs == "modulation"]
    assert len(embeds) == 4
    assert all("t_of_step" in call.inputs for call in embeds)
    given = {"x": torch.randn(2, 5, 4), "t": torch.full((2,), 0.3), "pooled": torch.randn(2, 4)}
    (found,) = chain(cut, dict(model.named_parameters()), given)
    assert torch.allclose(found, model(**given, return_dict=False), atol=1e-6)


def copies(forward: Any) -> int:
    """Count the copies of the timestep in a rewritten function, which still computes the same."""
    found = traced(forward, x=step("batch tokens 4"), t=timestep())
    tidy(found)
    tabulate_timesteps(found)
    found.graph.lint()
    x, t = torch.randn(2, 5, 4), torch.rand(2)
    assert torch.allclose(run(found, x=x, t=t), forward(x, t))
    return [operation(n) for n in found.graph.nodes if is_operation(n)].count("clone")


def test_what_meets_the_latents_reads_a_table() -> None:
    assert copies(lambda x, t: x * t[:, None, None]) == 0
    assert copies(lambda x, t: (x.sum((1, 2)) * t) * t) == 1


def test_what_is_made_of_the_timestep_alone_needs_no_copy() -> None:
    assert copies(lambda x, t: x + t.sin()[:, None, None]) == 0
