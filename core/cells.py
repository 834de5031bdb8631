# SPDX-License-Identifier: Apache-2.0
"""Values as cells of a table, alike on a screen, in Markdown and in a report."""

from __future__ import annotations

from typing import Any

__all__ = ["cell", "counted"]


def cell(value: Any) -> str:
    """Return a value as text: a dash for None, two decimals, four below 1, three digits below 0.01."""
    if value is None:
        return "–"
    if not isinstance(value, float):
        return str(value)
    if abs(value) < 0.01:
        return f"{value:.3g}"
    return f"{value:.4f}" if abs(value) < 1 else f"{value:.2f}"


def counted(count: int, noun: str) -> str:
    """Return a number with its noun: ``1 core``, ``2 cores``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
