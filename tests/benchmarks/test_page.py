# SPDX-License-Identifier: Apache-2.0
"""A result has one form: figures as JSON, and a section that names command, machine and versions."""

from __future__ import annotations

import ast
import importlib
import json
from pathlib import Path

import page
import pytest
from page import Table, section, write

KNOWN = {
    "command": "python benchmarks/step.py --rounds 2",
    "date": "2026-01-02",
    "machine": {
        "model": "A CPU",
        "cores": 2,
        "threads": 1,
        "features": ["avx2"],
        "gpus": ["A GPU"],
        "memory_available_bytes": 3 << 30,
    },
    "backends": ["OpenVINO 1, CPU", "RTX 2 can build: no GPU"],
    "versions": {"freewheel": "3", "python": "4", "onnx": "5"},
}

TOOLS = {"licences", "memory", "own_process", "page", "perceptual", "synthetic"}
"""Files of the folder that measure nothing by themselves."""


def scripts(repository: Path) -> list[Path]:
    return [p for p in sorted((repository / "benchmarks").glob("*.py")) if p.stem not in TOOLS]


def test_a_section_has_command_machine_versions_and_tables() -> None:
    table = Table(["policy", "setting", "dB"], [["off", "a", 1.0], ["on", "b", None]], "Of one:", 2)
    assert section("Steps", KNOWN, [table, "A remark."]).splitlines() == [
        "## Steps",
        "",
        "```",
        "python benchmarks/step.py --rounds 2",
        "```",
        "",
        "A CPU, cores 2, threads 1, 3.0 GiB of memory available, avx2, A GPU. OpenVINO 1, CPU; RTX 2 can build; "
        "freewheel 3; python 4. 2026-01-02.",
        "",
        "Of one:",
        "",
        "| policy | setting | dB |",
        "|---|---|--:|",
        "| off | a | 1.00 |",
        "| on | b | – |",
        "",
        "A remark.",
    ]


def test_memory_that_the_system_does_not_tell_is_left_out() -> None:
    machine = {**KNOWN["machine"], "memory_available_bytes": None}  # type: ignore[dict-item]
    assert "memory" not in section("Steps", {**KNOWN, "machine": machine}, [])


def test_figures_and_section_are_written_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["/somewhere/step.py", "--out", "a folder"])
    page.about.cache_clear()
    text = write(tmp_path / "new", "step", "Steps", {"rows": [1.5]}, Table(["x"], [[1.5]]))
    page.about.cache_clear()
    assert (tmp_path / "new" / "step.md").read_text(encoding="utf-8") == text
    figures = json.loads((tmp_path / "new" / "step.json").read_text(encoding="utf-8"))
    assert figures["rows"] == [1.5]
    assert figures["about"]["command"] == "python benchmarks/step.py --out 'a folder'"
    assert figures["about"]["versions"]["freewheel"]
    assert figures["about"]["machine"]["cores"] >= 1
    assert "python benchmarks/step.py --out 'a folder'" in text


def test_every_benchmark_writes_its_result_so(repository: Path) -> None:
    found = scripts(repository)
    assert {"step", "quality"} <= {p.stem for p in found}
    for path in found:
        text = path.read_text(encoding="utf-8")
        calls = [n.func for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call)]
        assert "write" in {c.id for c in calls if isinstance(c, ast.Name)}, path
        assert "out: Out = OUT" in text, path
        for other in ("argparse", '"|', "json.dump(", "print("):
            assert other not in text, f"{path}: {other}"


def test_what_benchmarks_import_of_the_package_is_there(repository: Path) -> None:
    missing = [
        f"{path.name}: {node.module}.{alias.name}"
        for path in sorted((repository / "benchmarks").glob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("freewheel.")
        for alias in node.names
        if not hasattr(importlib.import_module(str(node.module)), alias.name)
    ]
    assert missing == []
