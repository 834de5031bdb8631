# SPDX-License-Identifier: Apache-2.0
"""What divides a value and joins it again is said once, and computes the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from cases import run, traced
from torch import Tensor

from freewheel.compiler.cut.blocks import Instance
from freewheel.compiler.cut.parts import join_once
from freewheel.compiler.cut.row import step
from freewheel.compiler.cut.tidy import tidy
from freewheel.compiler.cut.trace import Trace
from freewheel.compiler.cut.words import is_operation, operation

ROWS = step("batch tokens 12")


def names(found: Trace) -> list[str]:
    return [operation(node) for node in found.graph.nodes if is_operation(node)]


def tidied(forward: Callable[[Tensor], Tensor]) -> list[str]:
    """Tidy a function of rows, check that it computes the same, and name its operations."""
    found = traced(forward, x=ROWS)
    tidy(found)
    join_once(found, [])
    found.graph.lint()
    for batch, tokens in ((2, 5), (1, 1)):
        x = torch.randn(batch, tokens, 12)
        assert torch.equal(run(found, x=x), forward(x))
    return names(found)


def test_parts_are_unsqueezed_before_they_are_split() -> None:
    def forward(x: Tensor) -> Tensor:
        shift, scale, gate = x.mean(1).chunk(3, dim=-1)
        y = x[..., :4] * (1 + scale[:, None]) + shift[:, None]
        return y * gate.unsqueeze(1) + gate[:, None]

    assert tidied(forward).count("unsqueeze") == 1


def test_a_part_that_is_read_as_it_is_leaves_the_split_alone() -> None:
    def forward(x: Tensor) -> Tensor:
        shift, scale = x.mean(1).chunk(2, dim=1)
        return x[..., :6] * scale[:, None] + shift.sum()

    assert tidied(forward).count("unsqueeze") == 1
    assert tidied(forward).count("mean") == 1


def test_indices_one_by_one_become_a_split() -> None:
    def forward(x: Tensor) -> Tensor:
        table = torch.arange(12.0).reshape(1, 1, 3, 4)
        shift, scale, gate = (table + x.reshape(x.shape[0], -1, 3, 4)).unbind(2)
        return gate * (scale + shift)

    found = tidied(forward)
    assert "unbind" not in found
    assert found.count("split") == 1
    assert found.count("reshape") == 1, "of the table alone: rows come flat"


def test_a_value_spread_over_the_indices_is_not_flattened_by_itself() -> None:
    def forward(x: Tensor) -> Tensor:
        mean = x.mean(1)
        one, two = (mean.reshape(-1, 2, 6) + mean[:, None, :6]).unbind(1)
        return one * two

    found = tidied(forward)
    assert found.count("split") == 1
    assert found.count("reshape") == 2, "the sum is flattened, not its sides"


@pytest.mark.parametrize("axis", [-1, 0])
def test_the_last_dimension_and_a_symbolic_one_are_unbound_as_they_are(axis: int) -> None:
    def forward(x: Tensor) -> Tensor:
        one, two = (x[..., :2] if axis == -1 else x[:2]).unbind(axis)
        return one - two

    found = traced(forward, x=step("2 tokens 12"))
    tidy(found)
    assert "unbind" in names(found) or axis == 0
    x = torch.randn(2, 3, 12)
    assert torch.equal(run(found, x=x), forward(x))


def test_two_slices_that_make_the_whole_are_the_whole() -> None:
    def forward(x: Tensor) -> Tensor:
        y, text = x * 2, x.shape[1] // 2
        return torch.cat([y[:, :text], y[:, text:]], dim=1) + 1

    assert tidied(forward) == ["mul", "add"]


def test_slices_in_another_order_or_of_others_are_joined() -> None:
    def swapped(x: Tensor) -> Tensor:
        return torch.cat([x[:, 1:], x[:, :1]], dim=1)

    def overlapping(x: Tensor) -> Tensor:
        return torch.cat([x[..., :7], x[..., 6:]], dim=-1)

    def mixed(x: Tensor) -> Tensor:
        return torch.cat([x[..., :6], (x + 1)[..., 6:]], dim=-1)

    def across(x: Tensor) -> Tensor:
        return torch.cat([x[..., :6], x[..., 6:]], dim=1)

    for forward in (swapped, overlapping, mixed, across):
        assert "cat" in tidied(forward)


def test_all_parts_of_a_split_are_the_whole_and_some_are_not() -> None:
    assert tidied(lambda x: torch.cat((x * 2).split(4, -1), -1) + 1) == ["mul", "add"]
    assert "cat" in tidied(lambda x: torch.cat((x * 2).split(4, -1)[:2], -1))
    assert "cat" in tidied(lambda x: torch.cat((x * 2).split(4, -1)[::-1], -1))


def test_what_a_block_divides_and_the_next_joins_stays_two_streams() -> None:
    found = traced(lambda x: torch.cat((x * 2).split(4, -1), -1) + 1, x=ROWS)
    tidy(found)
    nodes = [node for node in found.graph.nodes if is_operation(node)]
    cut = next(i for i, node in enumerate(nodes) if operation(node) == "cat")
    join_once(found, [Instance("blocks.0", nodes[:cut]), Instance("blocks.1", nodes[cut:])])
    assert "cat" in names(found)


def test_a_mask_is_not_repeated_for_each_head() -> None:
    def forward(x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q = x.reshape(batch, tokens, 3, 4).transpose(1, 2)
        mask = x[:, None, :, 0].repeat_interleave(3, dim=0).reshape(batch, 3, 1, tokens)
        return F.scaled_dot_product_attention(q, q, q, mask).sum(1)

    assert "repeat_interleave" not in tidied(forward)


def test_parts_turned_there_and_back_are_turned_once() -> None:
    def forward(x: Tensor) -> Tensor:
        heads = (x + 1).reshape(x.shape[0], -1, 3, 4)
        image, text = heads[:, :-1], heads[:, -1:]
        turned = (image.transpose(1, 2) * 2).transpose(1, 2)
        return torch.cat([turned, text], dim=1).transpose(1, 2)

    assert tidied(forward).count("permute") == 1


def test_a_part_that_is_turned_otherwise_keeps_its_turn() -> None:
    def forward(x: Tensor) -> Tensor:
        cube = (x + 1).reshape(x.shape[0], -1, 3, 4)
        turned = (cube.permute(0, 2, 3, 1) * 2).permute(0, 3, 2, 1)
        return torch.cat([turned, cube.transpose(2, 3)], dim=1).permute(0, 2, 1, 3)

    assert tidied(forward).count("permute") == 4, "there, back, beside, and all"
