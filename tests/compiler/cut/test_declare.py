# SPDX-License-Identifier: Apache-2.0
"""A found cut in the bundle's words is the transformer, as a session calls its graphs."""

from __future__ import annotations

import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import EVERY_RUN, Case, case
from small_configs import CASES
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from chain import Chain, relative, taken_weights
from test_prove import OTHER

from freewheel.compiler.cut.declare import declare
from freewheel.compiler.cut.declared import Cut
from freewheel.compiler.cut.prove import eager, random_inputs
from freewheel.compiler.cut.row import SIZES
from freewheel.core.errors import ExportError

DECLARED = [
    pytest.param(name, marks=() if name in EVERY_RUN else pytest.mark.nightly) for name in CASES
]
ERRORS = {"bfloat16": 8e-3, "float16": 1e-3}
"""Largest relative L2 of a low-precision body, unless diffusers' own in that precision is larger: 3e-3
to 6e-3 and 4e-4 to 8e-4 were seen."""


UNREAD = {"motif_video": ("image_embedder.",), "nucleus_image": (".norm_added_q.",)}
"""Case → parts of the names of weights that its forward does not read."""


def declared(one: Case, precision: Any = "float32", stored: str = "float32") -> Cut:
    config: Any = one.model.config
    return declare(one.row, type(one.model), dict(config), precision, lambda name: stored)


def error(one: Case, cut: Cut, counts: dict[str, int]) -> float:
    config: Any = one.model.config
    raw = random_inputs(one.row, config, one.row.sizes(config, counts))
    given: dict[str, Tensor] = {}
    for name, taken in cut.inputs.items():
        value = raw[taken.argument]
        if isinstance(value, int):
            value = torch.arange(value, dtype=torch.float32)
        if taken.runs == "run":
            value = value[: len(taken.of)] * taken.scale + taken.offset
        given[name] = value
    chain = Chain(cut, one.model)
    chain.run(given)
    outputs = chain.segments["finish"].outputs
    pairs = zip(outputs, eager(one.row, one.model, raw), strict=True)
    return max(relative(chain.values[name], expected) for name, expected in pairs)


@pytest.mark.parametrize("name", DECLARED)
def test_graphs_called_as_a_session_does_are_the_transformer(name: str) -> None:
    one = case(name)
    cut = declared(one)
    for counts in (SIZES, OTHER, dict.fromkeys(SIZES, 1)):
        assert error(one, cut, counts) < 1e-5, counts


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", DECLARED)
def test_a_body_of_low_precision_stays_close(name: str, precision: str) -> None:
    one = case(name)
    found = error(one, declared(one, precision), SIZES)
    assert found > 1e-5
    assert found < ERRORS[precision] or found < own_error(one, getattr(torch, precision))


def own_error(one: Case, dtype: torch.dtype) -> float:
    """Return how far diffusers' transformer lies from itself in another dtype, inputs rounded to it."""
    config: Any = one.model.config
    raw = random_inputs(one.row, config, one.row.sizes(config))
    rounded = {
        name: value.to(dtype)
        if one.cut.inputs[name].fill == "normal" and isinstance(value, Tensor)
        else value
        for name, value in raw.items()
    }
    lowered = deepcopy(one.model).to(dtype)
    return relative(eager(one.row, lowered, rounded)[0].float(), eager(one.row, one.model, raw)[0])


@pytest.mark.parametrize("name", DECLARED)
def test_every_tensor_of_the_checkpoint_is_some_graphs_weight(name: str) -> None:
    one = case(name)
    unread = {n for n in one.model.state_dict() if any(part in n for part in UNREAD.get(name, ()))}
    assert taken_weights(declared(one)) == set(one.model.state_dict()) - unread


def test_limits_are_whole_patches(wan: Case) -> None:
    limits = declared(wan).limits
    assert {n: one.most for n, one in limits.items()} == {"frames": 32, "height": 64, "width": 64}


def test_weights_are_taken_as_they_are_stored_but_for_the_bodys_products(wan: Case) -> None:
    cut = declared(wan, "float16", stored="bfloat16")
    block = next(s for s in cut.segments if s.name == "block")
    dtypes = {n: str(p.dtype) for n, p in block.module.named_parameters()}
    assert dtypes["attn1.to_q.weight"] == dtypes["ffn.net.2.bias"] == "torch.float16"
    assert dtypes["scale_shift_table"] == dtypes["attn1.norm_q.weight"] == "torch.bfloat16"
    head = next(s for s in cut.segments if s.name == "head")
    assert {str(p.dtype) for p in head.module.parameters()} == {"torch.bfloat16"}


def test_a_sequence_of_two_kinds_of_tokens_has_their_sum() -> None:
    one = case("flux")
    cut = declared(one)
    assert cut.sums == {"text_tokens_plus_tokens": ("text_tokens", "tokens")}
    rotary = cut.segments[0].outputs
    assert any("text_tokens_plus_tokens" in spec.shape for spec in rotary.values())


def test_blocks_may_each_read_what_an_earlier_one_left() -> None:
    cut = declared(case("hunyuan_dit"))
    (skip,) = (skip for stage in cut.stages for skip in stage.skips.values())
    assert len(set(skip.blocks)) == len(skip.blocks) > 1


def test_a_branch_that_was_not_traced_is_refused_with_its_line() -> None:
    """ChronoEdit skips in time where there are two latent frames: without its patch, a branch."""
    one = case("chrono_edit")
    with pytest.raises(ExportError, match=r"at frames = 2: transformer_chronoedit\.py:\d+"):
        declared(replace(one, row=replace(one.row, patches=())))


@pytest.mark.nightly
def test_a_timestep_of_one_number_makes_tables_all_the_same() -> None:
    """Z-Image takes one picture in a list, and its timestep as 1 at the end."""
    cut = declared(case("z_image"))
    tables = next(s for s in cut.segments if s.runs == "run")
    assert {spec.shape[0] for spec in tables.outputs.values()} == {"steps"}
    taken = cut.inputs["timesteps"]
    assert (taken.scale, taken.offset) == (-1000.0, 1000.0)
    assert cut.inputs["latents"].spec.shape == (1, 16, 1, "height", "width")
    assert cut.sums["tokens"] == (("height_over_2_times_width_over_2", 32),)
