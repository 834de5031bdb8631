# SPDX-License-Identifier: Apache-2.0
"""A segment's graph has its own inputs, weights and sizes."""

from __future__ import annotations

import pytest
import torch
from cases import Case, traced
from torch import Tensor

from freewheel.compiler.cut.classes import Classes, classify
from freewheel.compiler.cut.extract import extract
from freewheel.compiler.cut.row import run, step
from freewheel.compiler.cut.words import is_operation
from freewheel.core.errors import ExportError


def test_a_blocks_weights_are_named_below_the_block_and_on_meta(wan: Case) -> None:
    module = wan.cut.segments["block"].module
    names = {name for name, _ in module.named_parameters()}
    checkpoint = {n.removeprefix("blocks.2.") for n in wan.weights if n.startswith("blocks.2.")}
    context = {name for name, _ in wan.cut.segments["context"].module.named_parameters()}
    assert names | context == checkpoint
    assert names.isdisjoint(context)
    assert {weight.device.type for weight in module.parameters()} == {"meta"}


def test_weights_outside_blocks_have_their_full_names(wan: Case) -> None:
    names = [name for name, _ in wan.cut.segments["head"].module.named_parameters()]
    assert names == ["patch_embedding.weight", "patch_embedding.bias"]


def test_an_input_may_be_taken_for_its_shape_alone(wan: Case) -> None:
    assert "hidden_states" in wan.cut.segments["rotary"].inputs


def test_a_row_spread_over_tokens_is_joined_with_every_element_of_the_batch() -> None:
    """As the router of experts does: a step reads one row of the timestep's table for the whole batch."""

    def forward(t: Tensor, x: Tensor) -> Tensor:
        rows = t[:, None, None].expand(-1, x.shape[1], 3)
        return torch.cat([rows, x], dim=-1)

    found = traced(forward, t=run(), x=step("batch tokens 4"))
    nodes = [node for node in found.graph.nodes if is_operation(node)]
    module, _ = extract(found, classify(found), nodes, list(found.results), name="s")
    x = torch.randn(2, 5, 4)
    given = {"t": torch.tensor([7.0]), "x": x}
    names = [str(node.target) for node in module.graph.find_nodes(op="placeholder")]
    (joined,) = module(*(given[name] for name in names))
    torch.testing.assert_close(joined, torch.cat([torch.full((2, 5, 3), 7.0), x], dim=-1))


def test_a_size_that_no_input_has_is_refused_with_its_line() -> None:
    def forward(x: Tensor) -> Tensor:
        return torch.zeros(x.shape[0]) + 1

    found = traced(forward, x=step("batch 4"))
    nodes = [node for node in found.graph.nodes if is_operation(node)]
    classes: Classes = classify(found, [])
    found.inputs = {}
    with pytest.raises(ExportError, match=r"segment 's', module '' \(test_extract.py:\d+\).*size"):
        extract(found, classes, nodes, nodes[-1:], name="s")
