# SPDX-License-Identifier: Apache-2.0
"""Messages say where, what and what to do."""

from __future__ import annotations

import pytest

from freewheel.core import errors
from freewheel.core.errors import ConfigError, FreewheelError, nearest


def test_message_has_three_parts() -> None:
    assert str(ConfigError("x.json", "is empty", "fill it")) == "x.json: is empty; fill it"
    assert str(ConfigError("x.json", "is empty")) == "x.json: is empty"


@pytest.mark.parametrize("name", [n for n in errors.__all__ if n not in ("guess", "nearest")])
def test_every_error_has_a_code_and_an_exit_code(name: str) -> None:
    error = getattr(errors, name)("w", "x")
    assert isinstance(error, FreewheelError)
    assert error.code
    assert error.exit_code in (1, 3, 4, 5)


def test_nearest_names_the_match_and_all_that_is_known() -> None:
    assert (
        nearest("teecache", ["off", "teacache"]) == "did you mean 'teacache'? known: off, teacache"
    )
    assert nearest("zzz", ["off", "teacache"]) == "known: off, teacache"
