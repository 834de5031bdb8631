# SPDX-License-Identifier: Apache-2.0
"""A row's inputs stand where the transformer takes them."""

from __future__ import annotations

from freewheel.compiler.cut.arguments import leaves_of
from freewheel.compiler.cut.models import row_of
from freewheel.compiler.cut.row import OfConfig, Row, step


def test_an_input_that_the_config_leaves_out_is_not_given() -> None:
    row = row_of("WanTransformer3DModel")
    assert row is not None
    image = "encoder_hidden_states_image"
    assert image not in leaves_of(row, {})[1]
    assert image in leaves_of(row, {"image_dim": 8})[1]
    # With an image, `forward` takes all tokens but the last 512 for the image's.
    text = {c: leaves_of(row, {"image_dim": c})[1]["encoder_hidden_states"] for c in (None, 8)}
    assert [text[c].shape for c in (None, 8)] == [
        "batch text_tokens text_dim",
        "batch 512 text_dim",
    ]
    assert [text[c].dynamic() for c in (None, 8)] == [(0, 1), (0,)]


def test_nested_inputs_are_named_by_their_place() -> None:
    row = row_of("QwenImageTransformer2DModel")
    assert row is not None
    assert {"img_shapes.0.0.1", "img_shapes.0.0.2"} <= set(leaves_of(row, {})[1])


def test_a_number_of_the_config_is_no_input() -> None:
    row = Row("Model", {"x": step("batch 4"), "kwargs": {"base": OfConfig("width*2")}})
    arguments, named = leaves_of(row, {"width": 3})
    assert arguments["kwargs"] == {"base": 6}
    assert list(named) == ["x"]
