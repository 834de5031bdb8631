# SPDX-License-Identifier: Apache-2.0
"""Spell what `inspect` found as tables for people."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ..engine_layers import LAYER_COLUMNS

__all__ = ["draw_table", "operations"]

WIDTH = 110
TEXT_COLUMNS = ("runs", "precision", "operators", "policy", "computed steps", *LAYER_COLUMNS)


def draw_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Draw a table into lines; columns of numbers align right."""
    table = Table(box=SIMPLE_HEAD)
    for index, column in enumerate(columns):
        is_text = index == 0 or column in TEXT_COLUMNS
        table.add_column(column, justify="left" if is_text else "right")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    stream = io.StringIO()
    Console(file=stream, width=WIDTH, no_color=True, highlight=False).print(table)
    drawn = [line.rstrip() for line in stream.getvalue().splitlines()]
    return [title, *(line for line in drawn if line), ""]


def operations(count: int) -> str:
    """Spell a count of operations with its unit."""
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return str(count)
