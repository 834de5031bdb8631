# SPDX-License-Identifier: Apache-2.0
"""Rows: shapes over a config and sizes."""

from __future__ import annotations

import pytest
import sympy
import torch
from torch.utils._sympy.functions import FloorDiv

from freewheel.compiler.cut.row import (
    SIZES,
    Input,
    OfConfig,
    Row,
    prompt,
    size,
    size_expression,
    step,
)


def test_a_shape_is_read_from_config_and_sizes() -> None:
    latents = step("batch in_channels 1+frames height*width")
    sizes = {**SIZES, "frames": 2, "height": 3, "width": 4}
    assert latents.dimensions({"in_channels": 16}, sizes) == (2, 16, 3, 12)
    assert latents.dynamic() == (0, 2, 3)
    assert size("height").dynamic() == (0,)
    assert prompt("2 in_channels").dynamic() == ()


def test_sizes_are_multiples_of_patches() -> None:
    row = Row("X", {}, multiples={"height": "patch[1]"})
    assert row.sizes({"patch": [1, 4]}, {"height": 5, "width": 7}) == {"height": 20, "width": 7}


def test_no_two_traced_sizes_are_equal() -> None:
    assert len(set(SIZES.values())) == len(SIZES)


def test_a_shape_can_name_nothing_but_numbers() -> None:
    with pytest.raises(NameError):
        Input("step", "open").dimensions({}, SIZES)


def test_what_a_model_takes_as_complex_numbers_is_pairs() -> None:
    pairs = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    taken = prompt("2 2", pairs=True).argument(pairs)
    assert taken.tolist() == [1 + 2j, 3 + 4j]


def test_a_number_of_the_config_is_an_expression_over_it_alone() -> None:
    assert OfConfig("(sample_size//2)**2").number({"sample_size": 16, "name": "x"}) == 64
    with pytest.raises(TypeError):  # sizes are not known yet
        OfConfig("height").number({})


def test_a_dimension_is_an_expression_over_sizes_alone() -> None:
    height, width = (sympy.Symbol(n, integer=True, positive=True) for n in ("height", "width"))
    found = size_expression("(height//patch_size)*width", {"patch_size": 2, "name": "x"})
    assert found == FloorDiv(height, 2) * width
    assert size_expression("2*width-1", {}) == 2 * width - 1
