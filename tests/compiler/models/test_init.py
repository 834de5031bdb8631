# SPDX-License-Identifier: Apache-2.0
"""The families table, and what every family's cut keeps to."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import diffusers
import pytest
import test_flux
import test_hunyuan
import test_ltx
from small_configs import CASES

from freewheel.compiler.cut.declared import FIRST_BLOCK_RESIDUAL, Cut, Runs
from freewheel.compiler.cut.models import FAMILIES, Row, family_of, row_of
from freewheel.configs.load import load_config
from freewheel.core.errors import CheckpointError
from freewheel.runtime.settings import config_entry

TINY = {"flux": test_flux.TINY, "hunyuan": test_hunyuan.TINY, "ltx": test_ltx.TINY}
"""Configs that the families' own tests cut too."""

DAILY = ("wan", *TINY)

CONFIGS = [
    pytest.param((row_of(CASES[name][0]), CASES[name][1]), id=name, marks=pytest.mark.nightly)
    for name in CASES
] + [pytest.param((f, TINY.get(f.name, {})), id=f.name) for f in FAMILIES if f.name in DAILY]


@pytest.fixture(scope="module", params=CONFIGS)
def cut(request: pytest.FixtureRequest, shared_cut: Callable[..., Cut]) -> Cut:
    return shared_cut(*request.param, "bfloat16")


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_rows_name_classes_of_diffusers(family: Row) -> None:
    assert hasattr(diffusers, family.model)
    assert all(hasattr(diffusers, p) for p in family.pipelines)
    assert family_of(family.model, "x") is family


def test_unknown_class_is_refused_where_it_was_read() -> None:
    with pytest.raises(CheckpointError) as caught:
        family_of("WanAnimate2Transformer3DModel", "some/config.json")
    assert caught.value.where == "some/config.json"
    assert "'WanAnimate2Transformer3DModel'" in caught.value.what
    assert "WanTransformer3DModel" in caught.value.hint


def test_segment_names_are_unique_and_stages_name_them(cut: Cut) -> None:
    names = [s.name for s in cut.segments]
    assert len(set(names)) == len(names)
    for stage in cut.stages:
        assert {stage.block, stage.context, stage.tapped} - {None} <= set(names)
    assert {s.runs for s in cut.segments} <= set(get_args(Runs))


def test_every_input_is_given_by_callers_or_by_another_segment(cut: Cut) -> None:
    made = {n for s in cut.segments for n in s.outputs} | set(cut.inputs)
    of_blocks = {n for stage in cut.stages for n in (*stage.reads, *stage.skips)}
    assert {n for stage in cut.stages for values in stage.reads.values() for n in values} <= made
    handed_on = {
        n.removesuffix("_out") for s in cut.segments if s.runs == "block" for n in s.outputs
    }
    for segment in cut.segments:
        assert set(segment.inputs) <= made | of_blocks | handed_on, segment.name
    # A probe's graph is the same for every family, and so none of the cut's own.
    given = made | {FIRST_BLOCK_RESIDUAL}
    assert {value for value, _ in cut.signals.values()} <= given


def test_every_dimension_has_a_size(cut: Cut) -> None:
    given = {d for i in cut.inputs.values() for d in i.spec.shape if isinstance(d, str)}
    for segment in cut.segments:
        for spec in (*segment.inputs.values(), *segment.outputs.values()):
            assert {d for d in spec.shape if isinstance(d, str)} <= given | {*cut.dims, *cut.sums}
    latent = {"frames", "height", "width"}
    for factors in cut.dims.values():
        assert {name for name, _ in factors} <= given | latent


@pytest.mark.parametrize(
    ("name", "config", "coefficients"),
    [
        ("flux", "flux_dev_tea", [498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861]),
        (
            "hunyuan",
            "hunyuan_video_tea",
            [733.226126, -401.131952, 67.5869174, -3.149878, 0.0961237896],
        ),
        ("ltx", "ltx_video_tea", [21.4700694, -12.8016453, 2.31279151, 0.792487521, 0.00969274326]),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_published_polynomials_look_at_a_signal_that_the_family_has(
    shared_cut: Callable[..., Cut], name: str, config: str, coefficients: list[float]
) -> None:
    """Values of github.com/ali-vilab/TeaCache, commit 7c10efc; first and last step exact."""
    entry = config_entry(load_config(f"teacache/{config}"))
    setting = entry.cache
    assert setting.parameters["coefficients"] == coefficients
    assert (setting.guard.first_exact, setting.guard.last_exact) == (1, 1)
    row = next(row for row in FAMILIES if row.name == name)
    cut = shared_cut(row, TINY[name])
    assert cut.signals[setting.signal] == ("modulated_input", "step")
    assert (entry.generation.guidance_scale == 1.0) == (name != "ltx"), "guidance is inside"


def test_only_the_body_leaves_float32(cut: Cut) -> None:
    low = {s.name for s in cut.segments if s.precision != "float32"}
    body = (
        {s.block for s in cut.stages}
        | {s.tapped for s in cut.stages}
        | {s.context for s in cut.stages}
    )
    assert low == body - {None}
    for segment in cut.segments:
        for name, spec in segment.outputs.items():
            is_low = spec.dtype in ("bfloat16", "float16")
            assert not is_low or segment.runs == "prompt_block", (segment.name, name)
