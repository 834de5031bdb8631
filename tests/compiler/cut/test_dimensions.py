# SPDX-License-Identifier: Apache-2.0
"""Sizes get the names that a manifest derives them by."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch
from cases import Case
from torch.utils._sympy.functions import PythonMod

from freewheel.compiler.cut.dimensions import Dimensions
from freewheel.compiler.cut.words import arguments, results
from freewheel.core.errors import ExportError


@pytest.fixture(scope="module")
def dimensions(wan: Case) -> Dimensions:
    config: Any = wan.model.config
    (hidden,) = results(wan.cut.segments["head"].module)
    return Dimensions(wan.row, wan.cut, config, hidden)


def test_tokens_follow_from_the_latents(dimensions: Dimensions) -> None:
    assert dimensions.factors == {
        "tokens": (("frames", 1), ("height", 2), ("width", 2)),
        "tokens_per_frame": (("height", 2), ("width", 2)),
    }
    sizes = {"frames": 3, "height": 10, "width": 14}
    assert dimensions.derived(sizes) == {**sizes, "tokens": 105, "tokens_per_frame": 35}


def test_a_value_is_described_by_named_sizes(wan: Case, dimensions: Dimensions) -> None:
    (latents,) = arguments(wan.cut.segments["head"].module)
    spec = dimensions.spec(latents, torch.float32)
    assert (spec.dtype, spec.shape) == ("float32", ("batch", 4, "frames", "height", "width"))
    (hidden,) = results(wan.cut.segments["head"].module)
    assert dimensions.spec(hidden, torch.float16).shape == ("batch", "tokens", 24)
    assert dimensions.spec(hidden, torch.float16, batch=1).shape[0] == 1


def test_a_product_written_as_a_sum_is_a_product(dimensions: Dimensions) -> None:
    batch, frames = sympy.symbols("batch frames", integer=True, positive=True)
    found = dimensions._name(batch * (frames - 2) + 2 * batch, "is of a size")
    assert found == dimensions._name(batch * frames, "is of a size")
    assert dimensions.factors[found] in (
        (("batch", 1), ("frames", 1)),
        (("frames", 1), ("batch", 1)),
    )


def test_a_size_without_a_name_is_refused(dimensions: Dimensions) -> None:
    assert dimensions.of_word("text_tokens") == "text_tokens"
    with pytest.raises(ExportError, match=r"no name: 100\*text_tokens"):
        dimensions.of_word("text_tokens*100")
    with pytest.raises(ExportError, match=r"no name: 9 - text_tokens"):
        dimensions.of_word("9-text_tokens")


@pytest.mark.parametrize(
    ("word", "name", "terms"),
    [
        (
            "text_tokens+image_tokens",
            "image_tokens_plus_text_tokens",
            ("image_tokens", "text_tokens"),
        ),
        ("text_tokens+8", "text_tokens_plus_8", ("text_tokens", 8)),
        ("text_tokens*2", "text_tokens_times_2", ("text_tokens", "text_tokens")),
        ("8*height", "height_times_8", ("height",) * 8),
        ("4*frames-7", "frames_times_4_minus_7", (*("frames",) * 4, -7)),
        (
            "frames*(height//2)*(width//2)+text_tokens+1",
            "text_tokens_plus_1_plus_tokens",
            ("text_tokens", 1, "tokens"),
        ),
    ],
)
def test_a_sum_is_named_by_its_terms(
    dimensions: Dimensions, word: str, name: str, terms: tuple[Any, ...]
) -> None:
    assert dimensions.of_word(word) == name
    assert dimensions.sums[name] == terms


def test_a_part_of_the_latents_grid_is_derived_as_tokens_are(dimensions: Dimensions) -> None:
    assert dimensions.of_word("height//2") == "height_over_2"
    assert dimensions.factors["height_over_2"] == (("height", 2),)


def test_a_padded_sequence_is_rounded_up(wan: Case, dimensions: Dimensions) -> None:
    text = sympy.Symbol("text_tokens", integer=True, positive=True)
    padded = dimensions._name(text + PythonMod(-text, 32), "")
    assert padded == "text_tokens_up_to_32"
    assert dimensions.sums[padded] == (("text_tokens", 32),)
    sizes = {"frames": 3, "height": 10, "width": 14, "text_tokens": 33, "image_tokens": 1}
    assert dimensions.derived(sizes)[padded] == 64
