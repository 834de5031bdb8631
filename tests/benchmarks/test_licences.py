# SPDX-License-Identifier: Apache-2.0
"""The page of licences names every dependency, with a licence where it is installed."""

from __future__ import annotations

from pathlib import Path

from licences import dependencies, licence_of


def test_every_dependency_stands_on_the_page(repository: Path) -> None:
    page = (repository / "docs" / "reference" / "licences.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    listed = {(name, kind): licence for name, kind, licence in rows[1:]}
    assert set(listed) == set(dependencies())
    for (name, kind), licence in listed.items():
        if kind == "run":
            assert licence not in ("", "?", "not installed here"), name


def test_what_is_not_installed_has_none() -> None:
    assert licence_of("no-such-package-of-ours") is None
    assert "BSD" in str(licence_of("numpy"))
