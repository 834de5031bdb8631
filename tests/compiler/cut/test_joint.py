# SPDX-License-Identifier: Apache-2.0
"""A joint sequence goes from block to block as its parts, and no part is computed for nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import run, traced
from torch import Tensor, nn

from freewheel.compiler.cut.cut import cut_model
from freewheel.compiler.cut.joint import divide_joint
from freewheel.compiler.cut.prove import chain
from freewheel.compiler.cut.row import Row, prompt, step
from freewheel.compiler.cut.streams import find_streams
from freewheel.compiler.cut.words import Cut, operation


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return x + nn.functional.scaled_dot_product_attention(
            self.query(x), self.key(x), self.value(x)
        )


class Model(nn.Module):
    """Blocks of one sequence, joined before them and divided after a norm behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(5)])
        self.embed = nn.Linear(4, 4)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Model:
        return cls()

    def forward(self, x: Tensor, text: Tensor, return_dict: bool) -> Tensor:
        joint = torch.cat([self.embed(text), self.embed(x)], dim=1)
        for block in self.blocks:
            joint = block(joint)
        return nn.functional.layer_norm(joint, [4])[:, text.shape[1] :] + x


ROW = Row("Model", {"x": step("batch tokens 4"), "text": prompt("batch text_tokens 4")})


@pytest.fixture(scope="module")
def cut() -> Cut:
    return cut_model(ROW, Model, {})


def test_a_cut_of_divided_blocks_is_the_model(cut: Cut) -> None:
    model = Model()
    for tokens, text_tokens in ((5, 3), (1, 1), (3, 7)):
        inputs = {"x": torch.randn(2, tokens, 4), "text": torch.randn(2, text_tokens, 4)}
        found = chain(cut, dict(model.named_parameters()), inputs)[0]
        assert torch.allclose(found, model(**inputs, return_dict=False), atol=1e-6)


def test_sequences_of_one_length_are_divided_at_numbers() -> None:
    inputs = {"x": step("batch 5 4"), "text": prompt("batch 3 4")}
    cut = cut_model(Row("Model", inputs), Model, {})
    slices = [
        node.args[1:]
        for node in cut.segments["block"].module.graph.nodes
        if node.op == "call_function" and operation(node) == "slice"
    ]
    assert slices == [(1, 0, 3), (1, 3, 8)]


def test_each_block_hands_on_the_latents_and_the_text(cut: Cut) -> None:
    streams = find_streams(cut)
    assert [call.block for call in streams.blocks] == [f"blocks.{i}" for i in range(5)]
    assert set(streams.outputs["block"].values()) == {"hidden", "text"}


def test_between_and_behind_the_blocks_the_text_is_not_read(cut: Cut) -> None:
    assert [c.segment for c in cut.calls if not c.block] == ["prompt", "head", "finish"]
    last = [c for c in cut.calls if c.block][-1]
    read = [value for value in cut.calls[-1].inputs if value in last.outputs]
    assert len(read) == 1
    assert last.outputs.index(read[0]) == 1  # the parts come out as they were joined


class Channels(Model):
    """The channels of a sequence are the latents' and the prompt's."""

    def forward(self, x: Tensor, text: Tensor, return_dict: bool) -> Tensor:
        joint = torch.cat([x[..., :2], text[..., :2]], dim=-1)
        for block in self.blocks:
            joint = block(joint)
        return joint.sin()


def test_channels_that_are_joined_are_no_two_sequences() -> None:
    row = Row("Channels", {"x": step("batch tokens 4"), "text": prompt("batch tokens 4")})
    streams = find_streams(cut_model(row, Channels, {}))
    assert set(streams.outputs["block"].values()) == {"hidden"}


def kinds(forward: Any) -> tuple[list[str], Any]:
    found = traced(forward, x=step("batch tokens 4"), y=step("batch text_tokens 4"))
    divide_joint(found, [])
    return [operation(n) for n in found.graph.nodes if n.op == "call_function"], found


def test_a_part_of_what_was_joined_is_taken_before_it_is_computed_with() -> None:
    def forward(x: Tensor, y: Tensor) -> Tensor:
        table = torch.cat([y[0], x[0]]).unsqueeze(0)
        joint = torch.cat([y, x], dim=1) + table
        return nn.functional.gelu(joint)[:, y.shape[1] :]

    names, found = kinds(forward)
    assert "cat" not in names
    x, y = torch.randn(2, 5, 4), torch.randn(2, 3, 4)
    assert torch.allclose(run(found, x=x, y=y), forward(x, y))


@pytest.mark.parametrize(
    "forward",
    [
        lambda x, y: torch.cat([y, x], dim=1)[:, 1:],  # no operand's border
        lambda x, y: torch.cat([y, x], dim=1).softmax(1)[:, y.shape[1] :],  # sees all tokens
        lambda x, y: torch.cat([y, x], dim=1)[:, :: y.shape[1]],
    ],
)
def test_what_is_no_part_is_left_alone(forward: Any) -> None:
    names, found = kinds(forward)
    assert "cat" in names
    x, y = torch.randn(2, 5, 4), torch.randn(2, 3, 4)
    assert torch.allclose(run(found, x=x, y=y), forward(x, y))


class Guided(nn.Module):
    """Blocks that each divide what was joined of the prompt, as Wan's image-to-video blocks do."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([GuidedBlock() for _ in range(3)])

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Guided:
        return cls()

    def forward(self, x: Tensor, text: Tensor, image: Tensor, return_dict: bool) -> Tensor:
        context = torch.concat([image * 2, text * 3], dim=1)
        for block in self.blocks:
            x = block(x, context, image.shape[1])
        return x


class GuidedBlock(Block):
    def forward(self, x: Tensor, context: Tensor, length: int) -> Tensor:  # type: ignore[override]  # of a context
        image, text = context[:, :length], context[:, length:]
        return super().forward(x) + self.key(image).mean(1, keepdim=True) + text.mean(1, True)


def test_blocks_read_the_parts_of_what_was_joined_of_the_prompt() -> None:
    sizes = {"x": step("batch tokens 4"), "text": prompt("batch text_tokens 4")}
    cut = cut_model(Row("Guided", {**sizes, "image": prompt("batch image_tokens 4")}), Guided, {})
    nodes = [operation(n) for s in cut.segments.values() for n in s.module.graph.nodes]
    assert "cat" not in nodes
    assert "slice" not in nodes
    model = Guided()
    inputs = {name: torch.randn(2, size, 4) for name, size in (("x", 5), ("text", 3), ("image", 2))}
    found = chain(cut, dict(model.named_parameters()), inputs)[0]
    assert torch.allclose(found, model(**inputs, return_dict=False), atol=1e-6)
