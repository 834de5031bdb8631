# SPDX-License-Identifier: Apache-2.0
"""Equal blocks may each read a value of their own: a row of a table, a part of the prompt."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import pytest
from cases import Case
from test_declare import declared, error
from torch import Tensor, nn

from freewheel.compiler.cut.cut import cut_model
from freewheel.compiler.cut.prove import random_weights
from freewheel.compiler.cut.reads import find_reads
from freewheel.compiler.cut.row import SIZES, Row, prompt, run, step
from freewheel.compiler.cut.streams import find_streams
from freewheel.core.errors import ExportError

BLOCKS = 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor, scale: Tensor, text: Tensor) -> Tensor:
        scaled = nn.functional.layer_norm(x, [4]) * scale.unsqueeze(1)
        return x + nn.functional.scaled_dot_product_attention(
            self.query(scaled), self.key(text), self.value(text)
        )


class Own(nn.Module):
    """Each block reads a row of the timestep's vectors, and a layer of the text."""

    config: ClassVar[dict[str, Any]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(BLOCKS)])
        self.embed = nn.Linear(1, 4 * BLOCKS)

    @classmethod
    def from_config(cls, config: object) -> Own:
        return cls()

    def forward(self, x: Tensor, t: Tensor, layers: Tensor, *, return_dict: bool) -> Tensor:
        scales = self.embed(t.unsqueeze(1)).unflatten(1, (BLOCKS, 4))
        x = x.sin()
        for i, block in enumerate(self.blocks):
            x = block(x, scales[:, i], self.layer(layers, i))
        return x.cos()

    def layer(self, layers: Tensor, i: int) -> Tensor:
        return layers[:, i]


class Unequal(Own):
    """Texts of the blocks are not all as long."""

    def layer(self, layers: Tensor, i: int) -> Tensor:
        return layers[:, i] if i < 2 else layers[:, i:].flatten(1, 2)


ROW = Row(
    "Own",
    {
        "x": step("batch tokens 4"),
        "t": run(),
        "layers": prompt(f"batch {BLOCKS} text_tokens 4"),
    },
)


def case_of(model_class: Any) -> Case:
    model = random_weights(model_class())
    return Case(
        ROW, model, dict(model.named_parameters()), partial(cut_model, ROW, model_class, {})
    )


def test_each_block_names_what_it_reads() -> None:
    """Called as a session calls them, the graphs are the model: each block has its own values."""
    one = case_of(Own)
    cut = declared(one)
    (stage,) = cut.stages
    assert sorted(map(len, stage.reads.values())) == [BLOCKS, BLOCKS]
    assert all(len(set(values)) == BLOCKS for values in stage.reads.values())
    read = {graph.name: set(graph.inputs) & set(stage.reads) for graph in cut.segments}
    assert read[str(stage.context)] | read[stage.block] == set(stage.reads)
    assert read[str(stage.context)].isdisjoint(read[stage.block])
    for counts in (SIZES, dict.fromkeys(SIZES, 1)):
        assert error(one, cut, counts) < 1e-5


def test_a_blocks_own_input_has_a_name_that_no_value_has() -> None:
    """A reader that knows no such inputs finds nothing to bind them to."""
    cut = declared(case_of(Own))
    made = {name for graph in cut.segments for name in graph.outputs} | cut.inputs.keys()
    (stage,) = cut.stages
    assert made.isdisjoint(stage.reads)
    assert made.issuperset(name for values in stage.reads.values() for name in values)


def test_values_of_several_shapes_are_refused() -> None:
    with pytest.raises(ExportError, match="values of different shapes to equal blocks"):
        declared(case_of(Unequal))


def test_what_is_made_at_every_step_is_no_value_of_a_blocks_own() -> None:
    """A later block reads the latents' stream as `head` left it in place of its row."""
    cut = case_of(Own).cut
    begun = next(c for c in cut.calls if c.segment == "head").outputs
    calls = [
        replace(c, inputs=(c.inputs[0], *begun, *c.inputs[2:]))
        if (c.segment, c.block) == ("block", "blocks.2")
        else c
        for c in cut.calls
    ]
    changed = replace(cut, calls=tuple(calls))
    words = {name: name for call in cut.calls for name in (*call.inputs, *call.outputs)}
    with pytest.raises(ExportError, match=rf"made at every step: {begun[0]} to blocks\.2;"):
        find_reads(changed, find_streams(changed), words)
