# SPDX-License-Identifier: Apache-2.0
"""Cells of tables."""

from __future__ import annotations

from typing import Any

import pytest

from freewheel.core.cells import cell, counted


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        ("14 of 20", "14 of 20"),
        (3, "3"),
        (1.0, "1.00"),
        (45.678, "45.68"),
        (0.99941, "0.9994"),
        (-0.25, "-0.2500"),
        (0.00123456, "0.00123"),
        (0.0, "0"),
        (True, "True"),
    ],
)
def test_a_value_is_shown_with_the_digits_that_tell_something(value: Any, text: str) -> None:
    assert cell(value) == text


def test_one_thing_is_not_plural() -> None:
    assert [counted(n, "core") for n in (0, 1, 2)] == ["0 cores", "1 core", "2 cores"]
