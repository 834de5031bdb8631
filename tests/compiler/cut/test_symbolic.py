# SPDX-License-Identifier: Apache-2.0
"""Python's own functions keep sizes symbolic while a transformer is traced."""

from __future__ import annotations

import builtins
from typing import Any

import torch
from diffusers.models.transformers import transformer_wan
from torch import Tensor, nn

from freewheel.compiler.cut.symbolic import (
    REPLACED,
    symbolic_int,
    symbolic_len,
    symbolic_linspace,
    symbolic_python,
)


class Asks(nn.Module):
    """Asks a size for a number in every way that models do."""

    def forward(self, x: Tensor) -> Tensor:
        rows = symbolic_int(x.shape[0]) + symbolic_len(x)
        columns = REPLACED["max"](x.shape[0], x.shape[1]) + REPLACED["min"]([*x.shape])
        points = symbolic_linspace(0, 1, rows).sum() + symbolic_linspace(2, 3, x.shape[0]).sum()
        return torch.ones(rows) * points + columns


def test_sizes_stay_symbolic() -> None:
    dynamic = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    program = torch.export.export(
        Asks(), (torch.zeros(3, 5),), dynamic_shapes=(dynamic,), strict=False
    )
    for shape in ((3, 5), (7, 4), (1, 2)):
        x = torch.zeros(shape)
        assert torch.allclose(program.module()(x), Asks()(x)), shape


def test_numbers_are_treated_as_python_treats_them() -> None:
    assert symbolic_int("7") == 7
    assert isinstance(3, symbolic_int)
    assert REPLACED["max"](1, 2, key=lambda x: -x) == 1
    assert REPLACED["min"]([4, 3]) == 3
    assert symbolic_len([1, 2]) == 2
    assert torch.equal(symbolic_linspace(0, 1, 5), torch.linspace(0, 1, 5))


def test_blocks_keep_their_numbers_where_some_are_left_out() -> None:
    blocks = nn.ModuleList(nn.Linear(1, width) for width in range(1, 5))
    del blocks._modules["1"]
    assert [(i, b.out_features) for i, b in REPLACED["enumerate"](blocks)] == [
        (0, 1),
        (2, 3),
        (3, 4),
    ]
    assert list(REPLACED["enumerate"]("ab", start=1)) == [(1, "a"), (2, "b")]


def test_diffusers_is_left_as_it_was() -> None:
    def seen() -> tuple[Any, ...]:
        module: Any = transformer_wan
        return tuple(getattr(module, name, getattr(builtins, name)) for name in REPLACED)

    before = (seen(), torch.linspace)
    with symbolic_python():
        assert seen() == tuple(REPLACED.values())
    assert (seen(), torch.linspace) == before
