# SPDX-License-Identifier: Apache-2.0
"""Tables as Markdown, the form in which commands print them on stdout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..core.cells import cell

__all__ = ["markdown_table", "spread_cell"]


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], texts: int = 1) -> str:
    """Return a table whose columns align left while they hold words, then right.

    Args:
        columns: Headings.
        rows: What the cells show, as `cell` spells it.
        texts: Columns that hold words.
    """
    ruler = "|---" * texts + "|--:" * (len(columns) - texts)
    lines = ["| " + " | ".join(columns) + " |", ruler + "|"]
    lines += ["| " + " | ".join(cell(value) for value in row) + " |" for row in rows]
    return "\n".join(lines)


def spread_cell(spread: Sequence[float] | None) -> str | None:
    """Return the least and greatest of several measurements as one cell; None of one alone."""
    return None if spread is None else f"{spread[0]:.2f}–{spread[1]:.2f}"
