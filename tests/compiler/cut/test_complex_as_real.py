# SPDX-License-Identifier: Apache-2.0
"""Complex arithmetic as real: the same numbers, no complex tensor left."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import run, traced
from torch import Tensor

from freewheel.compiler.cut.complex_as_real import complex_as_real
from freewheel.compiler.cut.row import step
from freewheel.compiler.cut.tidy import tidy
from freewheel.compiler.cut.trace import value_of
from freewheel.core.errors import ExportError

TABLE = torch.polar(
    torch.ones(64, 4), torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
)


def pairs(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))


def rotated(x: Tensor) -> Tensor:
    return torch.view_as_real(pairs(x) * TABLE[: x.shape[1]]).flatten(-2)


def made_of_angles(x: Tensor) -> Tensor:
    angles = torch.arange(x.shape[1])[:, None] * torch.arange(4)
    factors = torch.polar(torch.ones_like(angles, dtype=torch.float32), angles.float())
    return torch.view_as_real(pairs(x) * factors).flatten(2)


def laid_out(x: Tensor) -> Tensor:
    z = torch.cat([pairs(x), pairs(x)], dim=-1).transpose(1, -1).unsqueeze(-1).squeeze(-1)
    first, second = z.permute(0, 2, 1).split([4, 4], dim=-1)
    stacked = torch.stack([first, second]).repeat(1, 1, 1, 1).unbind(0)
    return (stacked[0] * x.mean(-1, keepdim=True)).real + stacked[1].expand(*first.shape).imag


@pytest.mark.parametrize("forward", [rotated, made_of_angles, laid_out])
def test_the_real_graph_computes_the_same(forward: Callable[[Tensor], Tensor]) -> None:
    found = traced(forward, x=step("batch tokens 8"))
    tidy(found)
    values = [value_of(node) for node in found.graph.nodes if node.op != "output"]
    assert not any(isinstance(v, Tensor) and v.is_complex() for v in values)
    assert not any(value.is_complex() for value in found.constants.values())
    for shape in ((2, 13, 8), (3, 5, 8), (1, 1, 8)):
        x = torch.randn(shape)
        assert torch.allclose(run(found, x=x), forward(x), atol=1e-6), shape


def test_a_real_graph_is_left_alone() -> None:
    found = traced(lambda x: x.unsqueeze(-1).transpose(0, -2), x=step("batch tokens 8"))
    before = str(found.graph)
    complex_as_real(found)
    assert str(found.graph) == before


def test_an_unknown_operation_is_refused_with_its_line() -> None:
    found = traced(lambda x: pairs(x).angle(), x=step("batch tokens 8"))
    with pytest.raises(ExportError, match=r"complex 'angle' can't be written as real"):
        complex_as_real(found)
