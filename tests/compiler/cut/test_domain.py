# SPDX-License-Identifier: Apache-2.0
"""A size beyond a model's tables is refused at every door, with the module and line where they end."""

from __future__ import annotations

import re
from typing import Any

import pytest
import sympy
import torch
from cases import Case, traced
from test_declare import declared
from torch import Tensor

from freewheel.bundle.dims import derive_dims
from freewheel.bundle.manifest import LimitEntry, Manifest
from freewheel.compiler.cut.assumptions import Assumption
from freewheel.compiler.cut.domain import limits_of, place_limits
from freewheel.compiler.cut.row import step
from freewheel.compiler.sizes import Size, dims_of
from freewheel.core.errors import RequestError

ROPE = r"module 'rope' \(transformer_wan\.py:\d+\)"


def test_a_limit_says_module_and_line(wan: Case) -> None:
    limits = declared(wan).limits
    assert {n: limit.most for n, limit in limits.items()} == {
        "frames": 32,
        "height": 64,
        "width": 64,
    }
    assert all(re.fullmatch(ROPE, limit.where) for limit in limits.values())


def test_a_forecast_refuses_what_the_model_has_no_positions_for(wan: Case) -> None:
    cut = declared(wan)
    size = Size(height=1040, width=64, frames=1, text_tokens=7, steps=2, guidance_scale=1.0)
    with pytest.raises(
        RequestError, match=rf"--height 1040: is beyond the model's 64 pos.*, {ROPE}"
    ):
        dims_of(cut, size, None)


def test_a_session_refuses_it_before_it_computes() -> None:
    found: Any = Manifest.model_construct(
        dims={}, sums={}, limits={"height": LimitEntry(most=8, where="module 'rope' (model.py:3)")}
    )
    assert derive_dims(found, {"height": 8, "width": 9}) == {"height": 8, "width": 9}
    with pytest.raises(RequestError) as caught:
        derive_dims(found, {"height": 9})
    assert "positions for 8: module 'rope' (model.py:3)" in str(caught.value)


def test_limits_are_whole_patches_and_the_least_of_several() -> None:
    height, most = sympy.Symbol("height"), (9, 7, 20)
    domain = [Assumption(sympy.Le(height, number), "here") for number in most]
    others = [Assumption(sympy.Le(2, height), ""), Assumption(sympy.Le(height + 1, 3), "")]
    (limit,) = limits_of([*domain, *others], {"tokens": [("height", 2)]}).values()
    assert limit.most == 6


def test_a_limit_without_a_table_keeps_what_was_known() -> None:
    def forward(x: Tensor) -> Tensor:
        return x + torch.arange(4.0)

    found = traced(forward, x=step("batch tokens 4"))
    tokens = sympy.Symbol("tokens")
    found.domain = (Assumption(sympy.Le(tokens, 5), "a table's length"),)
    place_limits(found)
    assert found.domain[0].where == "a table's length"
