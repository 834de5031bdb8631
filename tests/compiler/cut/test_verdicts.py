# SPDX-License-Identifier: Apache-2.0
"""The page of models is true, and names every DiT of the installed diffusers."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
from held_out import HELD_OUT
from small_configs import CASES
from test_bundles import FOUND
from verdicts import (
    KINDS,
    OTHERS,
    PAGE,
    attached,
    classes,
    engines,
    listed,
    page,
    verdict,
)

from freewheel.compiler.cut.models import FAMILIES, MODELS, row_of

README = Path(__file__).parents[3] / "README.md"
MODELS_OF_THEIR_OWN = Path(__file__).parents[1] / "models"


def test_every_dit_has_a_verdict() -> None:
    assert list(listed()) == classes()
    assert {one.kind for one in listed().values()} <= KINDS.keys()


def test_a_bundle_is_said_of_what_a_named_row_cuts_and_of_nothing_else() -> None:
    bundles = {model for model, one in listed().items() if one.kind == "bundle"}
    held_out = {row.model for row, _ in HELD_OUT.values() if row.name}
    assert bundles == {family.model for family in FAMILIES} | held_out


def test_whatever_has_a_row_with_a_name_is_among_the_tests_of_bundles() -> None:
    files = {path.stem.removeprefix("test_") for path in MODELS_OF_THEIR_OWN.glob("test_*.py")}
    rows = [*MODELS, *(row for row, _ in HELD_OUT.values())]
    tested = {HELD_OUT[name][0].model for name in FOUND if name in HELD_OUT}
    tested |= {CASES[name][0] for name in FOUND if name in CASES}
    tested |= {row.model for row in rows if row.name in files}
    assert {row.model for row in rows if row.name} <= tested


def test_the_page_is_what_is_written() -> None:
    assert page(listed()) == PAGE.read_text()


def test_the_readme_counts_the_pipelines_that_attach_is_run_in() -> None:
    assert f"pipelines of {len(attached())} classes through `attach`" in README.read_text()


def test_a_class_has_one_small_model() -> None:
    assert not [model for model in OTHERS if row_of(model) is not None]


@pytest.mark.nightly
@pytest.mark.parametrize("model", classes())
def test_the_verdict_is_what_is_found(model: str) -> None:
    assert verdict(model) == replace(listed()[model], engines="")


@pytest.mark.nightly
@pytest.mark.tensorrt
@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed"
)
@pytest.mark.parametrize("model", [name for name, one in listed().items() if one.engines])
def test_engines_are_what_is_said_of_them(model: str) -> None:
    assert engines(model) == listed()[model].engines
