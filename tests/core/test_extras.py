# SPDX-License-Identifier: Apache-2.0
"""Extras: the table says what pyproject says, and a missing package is named with its remedy."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from freewheel.core import extras
from freewheel.core.errors import DependencyError
from freewheel.core.extras import EXTRAS, missing, require_extra
from freewheel.engines import BACKENDS


def test_the_table_is_the_one_of_pyproject(repository: Path) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = project["optional-dependencies"]

    def packages_of(name: str) -> set[str]:
        found = set()
        for requirement in declared[name]:
            nested = re.fullmatch(r"freewheel\[(.+)\]", requirement)
            if nested:
                found |= {p for extra in nested[1].split(",") for p in packages_of(extra)}
            else:
                found.add(re.split(r"[\[<>=!~ ;]", requirement)[0])
        return found

    for name, packages in EXTRAS.items():
        assert set(packages.values()) == packages_of(name), name
    assert set(BACKENDS) <= set(EXTRAS)
    for_any_machine = EXTRAS.keys() - {"tensorrt", "tensorrt-rtx"}
    assert packages_of("all") == set().union(*(EXTRAS[n].values() for n in for_any_machine))
    for_tests = for_any_machine - {"serve"}  # the client's tests have an environment of their own
    assert packages_of("dev") >= set().union(*(EXTRAS[n].values() for n in for_tests))


def test_the_page_lists_every_extra_with_its_packages(repository: Path) -> None:
    page = (repository / "docs" / "how-to" / "install.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w-]+)` \| ([^|]+) \| [^\n]+\|$", page, re.MULTILINE)
    assert rows == [(name, ", ".join(EXTRAS[name].values())) for name in EXTRAS]


def test_a_missing_package_is_named_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    require_extra("report", "run --report")
    absent = {"scipy"}
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name in absent else object())
    assert missing("report") == ["scipy"]
    wanted = (
        r"^run --report: needs scipy, which is not installed; "
        r"pip install 'freewheel\[report\]'$"
    )
    with pytest.raises(DependencyError, match=wanted) as caught:
        require_extra("report", "run --report")
    assert caught.value.exit_code == 4
    absent.add("skimage")
    with pytest.raises(DependencyError, match="needs scikit-image, scipy, which are not installed"):
        require_extra("report", "run --report")
