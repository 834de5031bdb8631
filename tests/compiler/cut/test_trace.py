# SPDX-License-Identifier: Apache-2.0
"""Tracing: what is traced of a transformer, what it costs, what it takes for granted."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import sympy
import torch
from cases import Case, run, traced
from diffusers import WanTransformer3DModel
from small_configs import WAN
from torch import nn
from torch.utils._sympy.functions import FloorDiv, Max, PythonMod

from freewheel.compiler.cut.models import row_of
from freewheel.compiler.cut.row import OfConfig, Row, step
from freewheel.compiler.cut.trace import (
    Assumption,
    _may_fail,
    block_lists,
    leaves_of,
    skeleton,
    trace,
)
from freewheel.core.errors import ExportError


def test_two_blocks_stand_for_all_and_keep_their_names() -> None:
    model, runs = skeleton(WanTransformer3DModel, {**WAN, "num_layers": 30})
    assert list(model.blocks._modules) == ["0", "1"]
    assert runs == {"blocks.1": 29}


def test_a_different_block_is_kept() -> None:
    class Odd(WanTransformer3DModel):
        @classmethod
        def from_config(cls, config: dict[str, object]) -> nn.Module:
            model = WanTransformer3DModel.from_config(config)
            model.blocks[3].norm1.eps = 1e-3
            return model

    model, runs = skeleton(Odd, {**WAN, "num_layers": 8})
    assert list(model.blocks._modules) == ["0", "1", "3", "4", "5"]
    assert runs == {"blocks.1": 2, "blocks.5": 3}


def test_lists_can_be_left_whole() -> None:
    for whole in ({"blocks"}, None):
        model, runs = skeleton(WanTransformer3DModel, WAN, whole)
        assert len(model.blocks) == 4
        assert runs == {}


def test_weights_take_no_memory_and_tables_keep_their_values() -> None:
    model, _ = skeleton(WanTransformer3DModel, {**WAN, "num_layers": 2, "ffn_dim": 10**9})
    assert model.blocks[0].ffn.net[2].weight.shape[1] == 10**9
    real = WanTransformer3DModel.from_config(WAN)
    assert torch.equal(model.rope.freqs_cos, real.rope.freqs_cos)


def test_lists_inside_blocks_are_no_lists_of_blocks() -> None:
    model, _ = skeleton(WanTransformer3DModel, WAN)
    assert list(block_lists(model)) == ["blocks"]


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


def test_the_domain_has_the_length_of_tables_over_the_rows_sizes(wan: Case) -> None:
    limits = {str(assumption.condition) for assumption in wan.cut.domain}
    assert {"frames <= 32", "height <= 65", "width <= 65"} <= limits


def test_what_cant_be_traced_is_refused_by_name() -> None:
    class Model(nn.Module):
        @classmethod
        def from_config(cls, config: dict[str, object]) -> nn.Module:
            return cls()

        def forward(self, x: torch.Tensor, return_dict: bool = False) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(ExportError, match=r"transformer 'Model': torch can't trace its forward"):
        trace(Row("Model", {"x": step("batch tokens")}), Model, {})


def written_in_turn(x: torch.Tensor) -> torch.Tensor:
    y = torch.empty_like(x)
    y[..., 0::2], y[..., 1::2] = x[..., 1::2].neg(), x[..., 0::2]
    return y.mul_(2).unflatten(-1, (2, -1)).transpose(1, 2).flatten(2)


def written_into_a_constant(x: torch.Tensor) -> torch.Tensor:
    scale = TABLE.clone()
    scale[1:].add_(3)
    return x * scale


TABLE = torch.arange(4.0)


@pytest.mark.parametrize("forward", [written_in_turn, written_into_a_constant])
def test_what_writes_in_place_is_traced_as_what_writes_nowhere(
    forward: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    found = traced(forward, x=step("batch tokens 4"))
    schemas = [getattr(node.target, "_schema", None) for node in found.graph.nodes]
    assert not any(schema.is_mutable for schema in schemas if schema is not None)
    given = torch.randn(3, 5, 4)
    assert torch.equal(run(found, x=given), forward(given))


def test_what_writes_into_its_own_values_is_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", None)
    assert traced(written_in_turn, x=step("batch tokens 4")).results


def test_an_assumption_counts_if_some_size_breaks_it() -> None:
    frames, height = (sympy.Symbol(n, integer=True, positive=True) for n in ("frames", "height"))

    def asked(condition: sympy.Basic, *, by_model: bool = False) -> bool:
        return _may_fail(Assumption(condition, "model.py:1", by_model=by_model))

    assert asked(sympy.Le(frames, 32))
    assert not asked(sympy.Le(1, frames * height))
    assert asked(sympy.Ne(frames, 1), by_model=True)
    assert not asked(sympy.Ne(frames, 1))
    assert not _may_fail(Assumption(sympy.Le(frames, 32), ""))


def test_which_of_two_strides_is_longer_breaks_nothing() -> None:
    height, width = (sympy.Symbol(n, integer=True, positive=True) for n in ("height", "width"))
    rows, columns = Max(1, FloorDiv(height, 2)), Max(1, FloorDiv(width, 2))
    assert not _may_fail(Assumption(sympy.Lt(columns, rows * columns), "model.py:1"))
    assert not _may_fail(Assumption(sympy.Lt(1, height * width), "model.py:1"))
    assert _may_fail(Assumption(sympy.Lt(columns, rows), "model.py:1", by_model=True))
    assert _may_fail(Assumption(sympy.Lt(columns, 32), "model.py:1"))


def test_a_size_at_which_an_assumption_has_no_value_breaks_nothing() -> None:
    height = sympy.Symbol("height", integer=True, positive=True)
    undefined_below_a_patch = sympy.Le(PythonMod(height, FloorDiv(height, 2)), 10**9)
    assert not _may_fail(Assumption(undefined_below_a_patch, "model.py:1"))
