# SPDX-License-Identifier: Apache-2.0
"""List the dependencies' licences: `python benchmarks/licences.py > docs/reference/licences.md`.

They are what the installed packages say of themselves; for each dependency of `pyproject.toml`.
"""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

from freewheel.tuning.table import markdown_table

ROOT = Path(__file__).resolve().parent.parent


def dependencies() -> list[tuple[str, str]]:
    """Return name and kind (``run``, or the extra's name) of every declared dependency."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = {"run": project["dependencies"], **project["optional-dependencies"]}
    names = {kind: [_name(r) for r in requirements] for kind, requirements in groups.items()}
    return [
        (name, kind)
        for kind, found in names.items()
        for name in found
        if name != project["name"]  # an extra of extras
    ]


def _name(requirement: str) -> str:
    return re.split(r"[\[<>=!~ ;]", requirement)[0]


def licence_of(name: str) -> str | None:
    """Return a package's licence in one line, or None where it is not installed."""
    try:
        found = metadata(name)
    except PackageNotFoundError:
        return None
    classifiers = [
        c.rsplit(" :: ", 1)[-1] for c in found.get_all("Classifier", []) if c.startswith("License")
    ]
    text = found.get("License-Expression") or ", ".join(classifiers) or found.get("License") or "?"
    return text.strip().splitlines()[0][:80]


def main() -> None:
    """Print the page."""
    print("# Licences of dependencies\n")
    print("Written by `python benchmarks/licences.py`; what is not installed there says so.")
    print("C++ builds take nlohmann-json (MIT), OpenVINO (Apache-2.0), zlib, CLI11 (BSD-3-Clause)")
    print("and, for tests, GoogleTest (BSD-3-Clause). The wheel of imageio-ffmpeg brings an ffmpeg")
    print("executable, which has licences of its own (LGPL or GPL, by its build).\n")
    rows = [[name, kind, licence_of(name) or "not installed here"] for name, kind in dependencies()]
    print(markdown_table(["package", "needed for", "licence"], rows, texts=3))


if __name__ == "__main__":
    main()
