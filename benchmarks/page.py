# SPDX-License-Identifier: Apache-2.0
"""Write what a benchmark measured: NAME.json with every figure, NAME.md as a section of docs/measurements.

A section has the command as it was given, the machine, versions and date, then tables. It is copied into its
page unchanged.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import typer

from freewheel.core.output import write_text
from freewheel.engines.doctor import GIB, examine
from freewheel.tuning.table import markdown_table

__all__ = ["OUT", "Out", "Table", "about", "section", "write"]

Out = Annotated[Path, typer.Option(help="Folder for the figures (.json) and the tables (.md).")]
"""The option ``--out`` of every benchmark."""

OUT = Path("out/bench")

SHOWN = ("freewheel", "python", "torch", "diffusers")
"""Versions in the section; the figures have all."""


@dataclass(frozen=True)
class Table:
    """One table of a section.

    Attributes:
        columns: Headings.
        rows: Values, as `freewheel.core.cells.cell` spells them; text stays as it is.
        text: What stands above it, if anything.
        texts: Columns on the left that hold words.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    text: str = ""
    texts: int = 1


@cache
def about() -> dict[str, Any]:
    """Return command, date, machine and versions of this process."""
    found = examine(Path())
    cpu = found["cpu"]
    return {
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {
            **cpu,
            "features": [name for name, here in cpu["features"].items() if here],
            "gpus": [gpu["name"] for gpu in found["gpus"]],
            "memory_available_bytes": found["memory_available_bytes"],
        },
        "backends": [b["reason"] for b in found["backends"] if b["runs"] or b["builds"]],
        "versions": {n: v for n, v in found["versions"].items() if v is not None},
    }


def section(title: str, known: Mapping[str, Any], parts: Sequence[Table | str]) -> str:
    """Return the section of a page.

    Args:
        title: Its heading.
        known: What `about` returned.
        parts: Tables and paragraphs, in order.
    """
    machine, versions = known["machine"], known["versions"]
    memory = machine["memory_available_bytes"]
    named = [
        machine["model"],
        f"cores {machine['cores']}",
        f"threads {machine['threads']}",
        *([] if memory is None else [f"{memory / GIB:.1f} GiB of memory available"]),
        *machine["features"],
        *machine["gpus"],
    ]
    backends = [reason.partition(":")[0] for reason in known["backends"]]
    software = [*backends, *(f"{n} {versions[n]}" for n in SHOWN if n in versions)]
    blocks = [
        f"## {title}",
        f"```\n{known['command']}\n```",
        f"{', '.join(named)}. {'; '.join(software)}. {known['date']}.",
    ]
    for part in parts:
        if isinstance(part, str):
            blocks.append(part)
            continue
        blocks += [part.text] if part.text else []
        blocks.append(markdown_table(part.columns, part.rows, part.texts))
    return "\n\n".join(blocks) + "\n"


def write(out: Path, name: str, title: str, figures: Mapping[str, Any], *parts: Table | str) -> str:
    """Write a result's files and return its section; files of that name are replaced.

    Args:
        out: Folder; made where it is missing.
        name: Of both files, without suffix.
        title: Heading of the section.
        figures: All that was measured; `about` stands beside it in the file.
        parts: Tables and paragraphs of the section, in order.

    Raises:
        OutputError: a file can't be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    text = section(title, about(), parts)
    figures = {"schema_version": 1, "title": title, "about": about(), **figures}
    write_text(out / f"{name}.json", json.dumps(figures, indent=1) + "\n", "choose another --out")
    write_text(out / f"{name}.md", text, "choose another --out")
    return text
