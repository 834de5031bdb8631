# SPDX-License-Identifier: Apache-2.0
"""What the distributions say of themselves: licence, parts of others, metadata."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

NAMED_IN_NOTICE = {
    "CLI11": "CLI11",
    "GTest": "GoogleTest",
    "nlohmann_json": "nlohmann/json",
    "OpenVINO": "OpenVINO",
    "Threads": None,
    "ZLIB": "zlib",
}
"""CMake package → its name in NOTICE; None for a part of the operating system."""


def test_the_licence_is_whole_and_goes_into_the_wheel() -> None:
    assert PROJECT["license"] == "Apache-2.0"
    assert PROJECT["license-files"] == ["LICENSE", "NOTICE"]
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License\n                           Version 2.0, January 2004" in text
    for section in range(1, 10):
        assert re.search(rf"^ +{section}\. \S", text, re.MULTILINE), section
    assert "END OF TERMS AND CONDITIONS" in text


def test_the_notice_names_every_part_that_cmake_looks_for() -> None:
    files = (ROOT / "cpp").rglob("CMakeLists.txt")
    text = "\n".join(path.read_text(encoding="utf-8") for path in files)
    wanted = set(re.findall(r"find_package\((\w+)", text))
    assert wanted == set(NAMED_IN_NOTICE)
    notice = (ROOT / "NOTICE").read_text(encoding="utf-8")
    assert [n for n in NAMED_IN_NOTICE.values() if n is not None and n not in notice] == []


def test_the_index_is_told_who_for_whom_and_what() -> None:
    assert PROJECT["maintainers"] == [{"name": "Freewheel developers"}]
    assert len(PROJECT["keywords"]) >= 5
    groups = {text.split(" :: ", 1)[0] for text in PROJECT["classifiers"]}
    assert {"Development Status", "Intended Audience", "Programming Language", "Topic"} <= groups
    # An index refuses the classifier beside the expression.
    assert not [text for text in PROJECT["classifiers"] if text.startswith("License ::")]
