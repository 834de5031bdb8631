# SPDX-License-Identifier: Apache-2.0
"""The table of models."""

from __future__ import annotations

import inspect

import diffusers
import pytest

from freewheel.compiler.cut.models import MODELS, SIZES, Input, Row, prompt, row_of, size, step


@pytest.mark.parametrize("row", MODELS, ids=lambda row: row.model)
def test_rows_name_classes_arguments_and_pipelines_of_diffusers(row: Row) -> None:
    forward = inspect.signature(getattr(diffusers, row.model).forward)
    assert set(row.inputs) <= set(forward.parameters)
    assert all(hasattr(diffusers, pipeline) for pipeline in row.pipelines)
    assert row_of(row.model) is row


def test_a_class_has_one_row() -> None:
    assert len({row.model for row in MODELS}) == len(MODELS)
    assert row_of("NoSuchTransformer") is None


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
