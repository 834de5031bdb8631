# SPDX-License-Identifier: Apache-2.0
"""Tidying changes spelling, never what a graph computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import run, traced
from torch import Tensor

from freewheel.compiler.cut.row import size, step
from freewheel.compiler.cut.tidy import tidy
from freewheel.compiler.cut.trace import Trace, value_of
from freewheel.compiler.cut.words import is_operation, operation, tensors_read

ROWS = step("batch tokens 8")


def names(found: Trace) -> list[str]:
    return [operation(node) for node in found.graph.nodes if is_operation(node)]


def test_zeros_like_takes_sizes_and_no_tensor() -> None:
    found = traced(lambda x: torch.zeros_like(x) + x.new_ones(x.shape[1], 1), x=ROWS)
    tidy(found)
    fills = [node for node in found.graph.nodes if operation(node) == "full"]
    assert len(fills) == 2
    assert all(tensors_read(node) == [] for node in fills)
    x = torch.randn(3, 4, 8)
    assert torch.equal(run(found, x=x), torch.ones(3, 4, 8))


def test_what_changes_nothing_goes() -> None:
    def forward(x: Tensor) -> Tensor:
        same = x.float().contiguous()[:, :, :].reshape(x.shape)
        return torch.nn.functional.dropout(same, 0.5, training=False) * 2

    found = traced(forward, x=ROWS)
    tidy(found)
    assert names(found) == ["mul"]


def test_a_cast_a_slice_and_a_copy_into_a_new_tensor_stay() -> None:
    found = traced(lambda x: x.half()[:, 1:], x=ROWS)
    tidy(found)
    assert [name for name in names(found) if name in ("to", "_to_copy", "slice")]
    x = torch.randn(2, 3, 8)
    assert torch.equal(run(found, x=x), x.half()[:, 1:])


def test_a_view_takes_any_strides_and_known_numbers() -> None:
    found = traced(lambda x: x.view(-1, 2, 4).transpose(1, 2) + 1, x=ROWS)
    tidy(found)
    (view,) = [node for node in found.graph.nodes if operation(node) == "reshape"]
    assert view.args[1] == [-1, 2, 4]


def test_a_view_infers_no_batch_that_its_source_has() -> None:
    rows, columns = size("rows"), size("columns")
    found = traced(
        lambda x, rows, columns: x.reshape(-1, rows, columns, 8) * 2,
        x=step("batch rows*columns 8"),
        rows=rows,
        columns=columns,
    )
    tidy(found)
    (view,) = [node for node in found.graph.nodes if operation(node) == "reshape"]
    assert -1 not in view.args[1]
    x = torch.randn(3, 6, 8)
    assert torch.equal(run(found, x=x, rows=2, columns=3), x.reshape(3, 2, 3, 8) * 2)


@pytest.mark.parametrize("filled", [True, False])
def test_a_mask_filled_with_a_truth_value_is_logic(filled: bool) -> None:
    def forward(x: Tensor) -> Tensor:
        return (x > 0).masked_fill(x > 1, filled).float()

    found = traced(forward, x=ROWS)
    tidy(found)
    logic = ["logical_or"] if filled else ["logical_not", "logical_and"]
    assert names(found) == ["gt", "gt", *logic, "_to_copy"]
    x = torch.randn(3, 4, 8)
    assert torch.equal(run(found, x=x), forward(x))


@pytest.mark.parametrize(
    "forward",
    [
        lambda x: x.masked_fill(x > 1, 0.0),
        lambda x: (x > 0).masked_fill(x > 1, (x > 2).all()).float(),
    ],
    ids=["a number", "a tensor"],
)
def test_what_is_no_known_truth_value_is_filled_in_as_before(forward: Any) -> None:
    found = traced(forward, x=ROWS)
    tidy(found)
    assert "masked_fill" in names(found)
    x = torch.randn(3, 4, 8)
    assert torch.equal(run(found, x=x), forward(x))


@pytest.mark.parametrize("batch_first", [True, False])
def test_one_sequence_is_not_padded(batch_first: bool) -> None:
    def forward(x: Tensor) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence([x * 2], batch_first=batch_first)

    found = traced(forward, x=ROWS)
    tidy(found)
    assert names(found) == ["mul", "unsqueeze"]
    x = torch.randn(3, 4, 8)
    assert torch.equal(run(found, x=x), forward(x))


def test_an_axis_of_another_size_than_one_is_not_squeezed() -> None:
    """What does nothing at the traced sizes does nothing at a size of 1 either."""
    found = traced(lambda x: x.squeeze(1) * 2, x=ROWS)
    tidy(found)
    assert names(found) == ["mul"]
    x = torch.randn(2, 1, 8)
    assert torch.equal(run(found, x=x), x * 2)


def test_indices_are_of_int64() -> None:
    def forward(x: Tensor) -> Tensor:
        return x.permute(2, 0, 1)[torch.arange(8, dtype=torch.int32).flip(0)]

    found = traced(forward, x=ROWS)
    tidy(found)
    (node,) = (n for n in found.graph.nodes if n.op == "call_function" and operation(n) == "index")
    (index,) = node.args[1]
    assert value_of(index).dtype is torch.int64
    x = torch.randn(3, 4, 8)
    assert torch.equal(run(found, x=x), forward(x))


def test_heads_that_share_keys_get_keys_of_their_own() -> None:
    def forward(x: Tensor) -> Tensor:
        query = x.unflatten(-1, (4, 2)).transpose(1, 2)
        shared = x[..., :4].unflatten(-1, (2, 2)).transpose(1, 2)
        return torch.nn.functional.scaled_dot_product_attention(
            query, shared, shared.sin(), enable_gqa=True
        )

    found = traced(forward, x=ROWS)
    tidy(found)
    (node,) = (
        n for n in found.graph.nodes if n.op == "call_function" and "attention" in operation(n)
    )
    assert "enable_gqa" not in node.kwargs
    assert {value_of(read).shape[1] for read in node.all_input_nodes} == {4}
    x = torch.randn(3, 5, 8)
    assert torch.allclose(run(found, x=x), forward(x), atol=1e-6)


def test_two_sequences_are_padded_still() -> None:
    found = traced(lambda x: torch.nn.utils.rnn.pad_sequence([x, x * 2]), x=ROWS)
    tidy(found)
    assert "pad_sequence" in names(found)


def turns(x: Tensor, *, first: int) -> Tensor:
    out = torch.zeros_like(x)
    out[..., first::2] = x[..., 0::2] * 2
    out[..., 1::2] = x[..., 1::2] * 3
    return out


def test_channels_written_in_turn_are_one_stack() -> None:
    found = traced(lambda x: turns(x, first=0), x=ROWS)
    tidy(found)
    assert names(found)[-2:] == ["stack", "reshape"]
    assert "slice_scatter" not in names(found)
    x = torch.randn(2, 3, 8)
    assert torch.equal(run(found, x=x), turns(x, first=0))


def test_channels_written_twice_or_never_are_no_stack() -> None:
    found = traced(lambda x: turns(x, first=1), x=ROWS)
    tidy(found)
    assert names(found).count("slice_scatter") == 2
    x = torch.randn(2, 3, 8)
    assert torch.equal(run(found, x=x), turns(x, first=1))


def test_a_norm_written_out_becomes_one_node() -> None:
    def forward(x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)

    found = traced(forward, x=ROWS)
    tidy(found)
    assert names(found) == ["rms_norm"]
    x = torch.randn(2, 3, 8)
    assert torch.allclose(run(found, x=x), forward(x), atol=1e-6)


def test_a_norm_over_other_axes_stays_as_it_is() -> None:
    found = traced(lambda x: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6), x=ROWS)
    tidy(found)
    assert "rms_norm" not in names(found)
