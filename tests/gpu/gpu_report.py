# SPDX-License-Identifier: Apache-2.0
"""The report that a run of tests/gpu writes."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version

import torch

PACKAGES = ("torch", "diffusers", "tensorrt", "tensorrt-rtx-cu12", "onnxruntime", "openvino")


class Report:
    """Tables that tests add and how each test went, written as one Markdown file."""

    def __init__(self) -> None:
        self.tables: dict[str, list[str]] = {}
        self.outcomes: dict[str, str] = {}

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Add rows below a title; its columns are those of the first call."""
        head = [_line(columns), "|---" * len(columns) + "|"]
        self.tables.setdefault(title, head).extend(_line(row) for row in rows)

    def markdown(self, command: str) -> str:
        """Return the whole report."""
        lines = ["# What ran on a GPU", "", f"Written by `{command}`: {_machine()}.", ""]
        for title, table in sorted(self.tables.items()):
            lines += [f"## {title}", "", *table, ""]
        lines += ["## Tests", "", "| test | outcome |", "|---|---|"]
        lines += [_line((f"`{name}`", outcome)) for name, outcome in self.outcomes.items()]
        return "\n".join(lines) + "\n"


def _line(cells: Sequence[object]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _machine() -> str:
    device = platform.processor() or platform.machine()
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        device = f"{gpu.name}, {gpu.total_memory / 1e9:.0f} GB, CUDA {torch.version.cuda}"
    return ", ".join([device, f"Python {platform.python_version()}", *_versions()])


def _versions() -> Iterator[str]:
    for name in PACKAGES:
        try:
            yield f"{name} {version(name)}"
        except PackageNotFoundError:
            continue
