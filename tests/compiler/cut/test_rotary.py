# SPDX-License-Identifier: Apache-2.0
"""Rotary embeddings are found by what they compute, however they are written."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import EVERY_RUN, case, run
from torch import Tensor, nn

from freewheel.compiler.cut.blocks import find_instances
from freewheel.compiler.cut.rotary import compose_rotary
from freewheel.compiler.cut.row import Row, step
from freewheel.compiler.cut.tidy import tidy
from freewheel.compiler.cut.trace import Trace, trace, value_of
from freewheel.compiler.cut.words import is_size, operation, sizes_of


def angles(tokens: int) -> Tensor:
    return torch.arange(tokens)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.03])


def neighbours(x: Tensor) -> Tensor:
    cos, sin = (f(angles(x.shape[1]))[None, :, None] for f in (torch.cos, torch.sin))
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([first * cos - second * sin, first * sin + second * cos], -1).flatten(3)


def half_apart(x: Tensor) -> Tensor:
    table = angles(x.shape[1]).repeat(1, 2)[None, :, None]
    first, second = x.chunk(2, dim=-1)
    return x * table.cos() + torch.cat([-second, first], -1) * table.sin()


def complex_pairs(x: Tensor) -> Tensor:
    factors = torch.polar(torch.ones(1), angles(x.shape[1]))[None, :, None]
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * factors).flatten(3)


def in_place(x: Tensor) -> Tensor:
    cos, sin = (f(angles(x.shape[1]))[None, :, None] for f in (torch.cos, torch.sin))
    out = torch.empty_like(x)
    out[..., 0::2] = x[..., 0::2] * cos - x[..., 1::2] * sin
    out[..., 1::2] = x[..., 0::2] * sin + x[..., 1::2] * cos
    return out


def mirrored(x: Tensor) -> Tensor:
    """A reflection of each pair: linear, but no rotation."""
    cos, sin = (f(angles(x.shape[1]))[None, :, None] for f in (torch.cos, torch.sin))
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([first * cos + second * sin, first * sin - second * cos], -1).flatten(3)


def squared(x: Tensor) -> Tensor:
    return neighbours(x) * neighbours(x)


def found_in(turn: Callable[[Tensor], Tensor]) -> tuple[Trace, nn.Module, int]:
    """Trace a model whose blocks turn queries and keys; compose their rotary embeddings."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.value = (nn.Linear(16, 16) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            query, key, value = (
                f(x).unflatten(2, (2, 8)) for f in (self.query, self.key, self.value)
            )
            heads = [part.transpose(1, 2) for part in (turn(query), turn(key), value)]
            return x + nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block(), Block()])

        @classmethod
        def from_config(cls, config: dict[str, Any]) -> nn.Module:
            return cls()

        def forward(self, x: Tensor, return_dict: bool) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    found = trace(Row("Model", {"x": step("batch tokens 16")}), Model, {})
    tidy(found)
    return found, Model(), compose_rotary(found, find_instances(found))


@pytest.mark.parametrize("turn", [neighbours, half_apart, complex_pairs, in_place])
def test_each_spelling_becomes_one_node(turn: Callable[[Tensor], Tensor]) -> None:
    found, model, count = found_in(turn)
    assert count == 4
    nodes = [node for node in found.graph.nodes if node.op == "call_function"]
    rotary = [node for node in nodes if operation(node) == "RotaryEmbedding"]
    assert len(rotary) == 4
    assert len({node.args[1:3] for node in rotary}) <= 4
    products = [n for n in nodes if operation(n) == "mul" and "nn_module_stack" in n.meta]
    assert [n for n in products if ".blocks" in str(n.meta["nn_module_stack"])] == []
    weights = dict(model.named_parameters())
    found.constants |= {node: weights[name] for node, name in found.weights.items()}
    for shape in ((2, 13, 16), (3, 5, 16), (1, 1, 16)):
        x = torch.randn(shape)
        with torch.no_grad():
            expected = model(x, return_dict=False)
        assert torch.allclose(run(found, x=x), expected, atol=1e-5), shape


@pytest.mark.parametrize("turn", [neighbours, half_apart, complex_pairs, in_place])
def test_tables_are_made_without_batch_and_heads(turn: Callable[[Tensor], Tensor]) -> None:
    found, _, _ = found_in(turn)
    outside = [
        node
        for node in found.graph.nodes
        if node.op == "call_function" and ".blocks" not in str(node.meta.get("nn_module_stack"))
    ]
    assert outside
    (x,) = found.inputs
    batch = value_of(x).shape[0].node.expr
    for node in outside:
        shape = getattr(value_of(node), "shape", ())
        assert is_size(node) or batch not in sizes_of(node), node
        assert math.prod(extent for extent in shape if isinstance(extent, int)) <= 8, node


def neighbours_of_four(x: Tensor) -> Tensor:
    cos, sin = (f(angles(x.shape[1])[:, :2])[None, :, None] for f in (torch.cos, torch.sin))
    first, second = x[..., :4].unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([first * cos - second * sin, first * sin + second * cos], -1).flatten(3)
    return torch.cat([turned, x[..., 4:]], dim=-1)


def test_channels_that_are_not_turned_have_the_angle_0() -> None:
    found, model, count = found_in(neighbours_of_four)
    assert count == 4
    weights = dict(model.named_parameters())
    found.constants |= {node: weights[name] for node, name in found.weights.items()}
    x = torch.randn(3, 5, 16)
    with torch.no_grad():
        expected = model(x, return_dict=False)
    assert torch.allclose(run(found, x=x), expected, atol=1e-5)


@pytest.mark.parametrize("turn", [mirrored, squared])
def test_what_is_no_rotation_is_left_alone(turn: Callable[[Tensor], Tensor]) -> None:
    _, _, count = found_in(turn)
    assert count == 4 * (turn is squared) * 2


@pytest.mark.parametrize(("name", "expected"), zip(EVERY_RUN, (2, 2, 4), strict=True))
def test_a_block_has_one_rotary_node_per_query_and_key(name: str, expected: int) -> None:
    cut = case(name).cut
    for segment in (s for s in cut.segments.values() if s.runs == "block"):
        nodes = [n for n in segment.module.graph.nodes if n.op == "call_function"]
        assert sum(operation(n) == "RotaryEmbedding" for n in nodes) == expected
        assert {"rope_cos", "rope_sin"} <= set(segment.inputs)
