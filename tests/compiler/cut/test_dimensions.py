# SPDX-License-Identifier: Apache-2.0
"""Sizes get the names that a manifest derives them by."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import Case

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


def test_limits_are_those_of_the_models_tables(dimensions: Dimensions) -> None:
    assert dimensions.limits() == {"frames": 32, "height": 64, "width": 64}


def test_a_size_without_a_name_is_refused(dimensions: Dimensions) -> None:
    assert dimensions.of_word("text_tokens") == "text_tokens"
    assert dimensions.of_word("text_tokens+image_tokens") == "image_tokens_plus_text_tokens"
    with pytest.raises(ExportError, match=r"no name: text_tokens\*2"):
        dimensions.of_word("text_tokens*2")
