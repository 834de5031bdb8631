# SPDX-License-Identifier: Apache-2.0
"""Extras: the table says what pyproject says, and a missing package is named with its remedy."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from freewheel.configs import extras
from freewheel.configs.errors import DependencyError
from freewheel.configs.extras import EXTRAS, missing, require_extra
from freewheel.engines import BACKENDS


def test_the_table_is_the_one_of_pyproject(repository: Path) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {
        name: {re.split(r"[\[<>=!~ ;]", requirement)[0] for requirement in requirements}
        for name, requirements in project["optional-dependencies"].items()
    }
    for name, packages in EXTRAS.items():
        assert set(packages.values()) == declared[name], name
    assert set(BACKENDS) <= set(EXTRAS)


def test_a_missing_package_is_named_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    require_extra("report", "run --report")
    absent = {"matplotlib"}
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name in absent else object())
    assert missing("report") == ["matplotlib"]
    wanted = (
        r"^run --report: needs matplotlib, which is not installed; "
        r"pip install 'freewheel\[report\]'$"
    )
    with pytest.raises(DependencyError, match=wanted) as caught:
        require_extra("report", "run --report")
    assert caught.value.exit_code == 4
    absent.add("jinja2")
    with pytest.raises(DependencyError, match="jinja2 and matplotlib, which are not installed"):
        require_extra("report", "run --report")
