# SPDX-License-Identifier: Apache-2.0
"""Write a row as the table has it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from ...bundle.streams import LATENTS
from .row import Input, Row

__all__ = ["spelled"]


def spelled(row: Row) -> str:
    """Return a row as the table would have it."""
    usual = Row("", {})
    lines = [f"    {_spelled(name)}: {_spelled(one)}," for name, one in row.inputs.items()]
    options = [
        f"    {field.name}={_spelled(getattr(row, field.name))},"
        for field in fields(row)
        if field.name not in ("model", "inputs")
        and getattr(row, field.name) != getattr(usual, field.name)
    ]
    body = "\n".join(f"    {line}" for line in lines)
    return "\n".join([f'Row(\n    "{row.model}",\n    {{\n{body}\n    }},', *options, ")"])


def _spelled(value: Any) -> str:
    if isinstance(value, Input):
        word = {"shape": "size"}.get(value.changes, value.changes)
        usual = {"run": "timestep"}.get(value.changes, "normal")
        parts = [f'"{value.shape}"']
        if value.changes != "shape" and value.dtype != "float32":
            parts.append(f'dtype="{value.dtype}"')
        if value.fill != usual:
            parts.append(f"fill={_spelled(value.fill)}")
        if value.pairs:
            parts.append("pairs=True")
        if value.of != (LATENTS,):
            parts.append(f"of={_spelled(value.of)}")
        return f"{word}({', '.join(parts)})"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_spelled(k)}: {_spelled(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return f"[{', '.join(map(_spelled, value))}]"
    if isinstance(value, tuple):
        return f"({', '.join(map(_spelled, value))}{',' * (len(value) == 1)})"
    return f'"{value}"' if isinstance(value, str) else repr(value)
