# SPDX-License-Identifier: Apache-2.0
"""The table of models."""

from __future__ import annotations

import inspect

import diffusers
import pytest

from freewheel.compiler.cut.models import MODELS, row_of
from freewheel.compiler.cut.row import Row


@pytest.mark.parametrize("row", MODELS, ids=lambda row: row.model)
def test_rows_name_classes_arguments_and_pipelines_of_diffusers(row: Row) -> None:
    forward = inspect.signature(getattr(diffusers, row.model).forward)
    assert set(row.inputs) <= set(forward.parameters)
    assert all(hasattr(diffusers, pipeline) for pipeline in row.pipelines)
    assert row_of(row.model) is row


def test_a_class_has_one_row() -> None:
    assert len({row.model for row in MODELS}) == len(MODELS)
    assert row_of("NoSuchTransformer") is None
