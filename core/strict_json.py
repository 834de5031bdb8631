# SPDX-License-Identifier: Apache-2.0
"""Read JSON that nobody vouches for, refusing what two readers could understand differently."""

from __future__ import annotations

import json
from typing import Any, NoReturn

__all__ = ["MAX_DEPTH", "parse_json"]

MAX_DEPTH = 64
"""Nesting allowed, as in the C++ reader; the bundle reference names it."""


def parse_json(text: str | bytes) -> Any:
    """Parse JSON of the standard: no key twice in one object, no NaN or Infinity, no deep nesting.

    Raises:
        ValueError: ``text`` is not that; says why.
    """
    try:
        data = json.loads(text, object_pairs_hook=_without_duplicates, parse_constant=_refuse)
    except RecursionError as error:
        raise ValueError(f"nested deeper than {MAX_DEPTH}") from error
    if _depth_exceeds(data, MAX_DEPTH):
        raise ValueError(f"nested deeper than {MAX_DEPTH}")
    return data


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"key '{twice}' stands twice")
    return found


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number of JSON")


def _depth_exceeds(data: Any, limit: int) -> bool:
    """Tell whether lists and objects nest deeper than ``limit``; walks level by level."""
    level = [data]
    for _ in range(limit):
        level = [
            child
            for node in level
            if isinstance(node, dict | list)
            for child in (node.values() if isinstance(node, dict) else node)
        ]
        if not level:
            return False
    return any(isinstance(node, dict | list) for node in level)
