# SPDX-License-Identifier: Apache-2.0
"""Taps are what the transformer itself computes there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import Case
from torch import fx, nn

from freewheel.compiler.cut.taps import attention_output, modulated_input
from freewheel.core.errors import ExportError


def test_the_signal_is_the_first_products_input_and_the_feature_what_attention_adds(
    wan: Case,
) -> None:
    """Wan's block 0, by hooks: what ``attn1`` is given, and its output times the gate."""
    segment = wan.cut.segments["block"]
    tapped = attention_output(segment.module, "hidden_states")
    signal = modulated_input(tapped, "hidden_states")
    tapped.graph.output_node().args = ((*tapped.graph.output_node().args[0], signal),)  # type: ignore[misc]  # a tuple of nodes
    tapped.recompile()

    model: Any = wan.model
    block, given = model.blocks[0], {}
    channels, tokens = model.config.num_attention_heads * model.config.attention_head_dim, 6
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    def keep(_: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        given["input"], given["output"] = inputs[0], output

    handle = block.attn1.register_forward_hook(keep)
    hidden, text, table = (
        normal(1, tokens, channels),
        normal(1, 4, channels),
        normal(1, 6, channels),
    )
    half = model.config.attention_head_dim // 2
    angles = normal(1, tokens, half)
    pairs = [t.repeat_interleave(2, dim=2).unsqueeze(2) for t in (angles.cos(), angles.sin())]
    with torch.no_grad():
        block(hidden, text, table, tuple(pairs))
        handle.remove()
        context = wan.cut.segments["context"].module
        own = dict(block.named_parameters())
        keys = torch.func.functional_call(
            context, {n: own[n] for n, _ in context.named_parameters()}, (text,)
        )
        by_name = dict(
            zip(segment.inputs, (table, hidden, angles.cos(), angles.sin(), *keys), strict=True)
        )
        made = torch.func.functional_call(
            tapped, {n: own[n] for n, _ in tapped.named_parameters()}, tuple(by_name.values())
        )
    gate = (block.scale_shift_table + table).chunk(6, dim=1)[2]
    assert torch.allclose(made[-1], given["input"], atol=1e-5)
    assert torch.allclose(made[-2], given["output"] * gate, atol=1e-5)


def test_a_block_without_products_or_sums_cant_be_tapped() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.zeros(1, 2, 3)
    graph.output((graph.call_function(torch.ops.aten.neg.default, (x,)),))
    module = fx.GraphModule(nn.Module(), graph)
    with pytest.raises(ExportError, match="no product reads the stream"):
        modulated_input(module, "x")
    with pytest.raises(ExportError, match="nothing is added to the stream"):
        attention_output(module, "x")


def test_of_a_product_of_a_joint_sequence_the_streams_part_is_the_signal() -> None:
    graph = fx.Graph()
    text, x = graph.placeholder("text"), graph.placeholder("x")
    text.meta["val"], x.meta["val"] = torch.zeros(1, 2, 4), torch.zeros(1, 3, 4)
    normed = graph.call_function(torch.ops.aten.silu.default, (x,))
    normed.meta["val"] = x.meta["val"]
    joint = graph.call_function(torch.ops.aten.cat.default, ([text, normed], 1))
    joint.meta["val"] = torch.zeros(1, 5, 4)
    product = graph.call_function(torch.ops.aten.matmul.default, (joint, graph.get_attr("w")))
    graph.output((product,))
    root = nn.Module()
    root.w = nn.Parameter(torch.zeros(4, 4))
    assert modulated_input(fx.GraphModule(root, graph), "x") is normed


def test_of_what_is_added_to_a_joint_sequence_the_streams_part_is_the_feature() -> None:
    graph = fx.Graph()
    text, x = graph.placeholder("text"), graph.placeholder("x")
    text.meta["val"], x.meta["val"] = torch.zeros(1, 2, 4), torch.zeros(1, 3, 4)
    joint = graph.call_function(torch.ops.aten.cat.default, ([text, x], 1))
    turned = graph.call_function(torch.ops.aten.neg.default, (joint,))
    added = graph.call_function(torch.ops.aten.add.Tensor, (turned, joint))
    for node in (joint, turned, added):
        node.meta["val"] = torch.zeros(1, 5, 4)
    graph.output((added,))
    tapped = attention_output(fx.GraphModule(nn.Module(), graph), "x")
    stream = torch.randn(1, 3, 4)
    assert torch.equal(tapped(torch.zeros(1, 2, 4), stream)[1], -stream)


def test_a_position_that_is_added_first_is_part_of_the_stream() -> None:
    graph = fx.Graph()
    x, position = graph.placeholder("x"), graph.placeholder("position")
    placed = graph.call_function(torch.ops.aten.add.Tensor, (x, position))
    turned = graph.call_function(torch.ops.aten.neg.default, (placed,))
    added = graph.call_function(torch.ops.aten.add.Tensor, (placed, turned))
    for node in (x, position, placed, turned, added):
        node.meta["val"] = torch.zeros(1, 3, 4)
    graph.output((added,))
    tapped = attention_output(fx.GraphModule(nn.Module(), graph), "x")
    stream, where = torch.randn(2, 1, 3, 4)
    assert torch.equal(tapped(stream, where)[1], -(stream + where))


def test_a_value_that_is_laid_out_anew_for_a_product_is_the_signal_as_it_was_before() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.zeros(1, 6, 4)
    normed = graph.call_function(torch.ops.aten.silu.default, (x,))
    normed.meta["val"] = x.meta["val"]
    by_frame = graph.call_function(torch.ops.aten.view.default, (normed, [2, 3, 4]))
    by_frame.meta["val"] = torch.zeros(2, 3, 4)
    graph.output(
        (graph.call_function(torch.ops.aten.matmul.default, (by_frame, graph.get_attr("w"))),)
    )
    root = nn.Module()
    root.w = nn.Parameter(torch.zeros(4, 4))
    assert modulated_input(fx.GraphModule(root, graph), "x") is normed
