# SPDX-License-Identifier: Apache-2.0
"""Name a value as the model's own source names it.

A traced node knows the source lines it came from. The innermost line that belongs to an assignment
gives the name: `timestep_proj = self.time_proj(...)` is ``timestep_proj`` in every graph and table.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Collection
from functools import cache
from pathlib import Path

from torch import fx

__all__ = ["fresh_name", "module_path", "source_of", "value_name"]

FRAME = re.compile(r'File "([^"]+)", line (\d+)')


def value_name(node: fx.Node) -> str:
    """Return the variable that a value is assigned to, else its module and operation."""
    if "value_name" in node.meta:
        return str(node.meta["value_name"])
    frames = FRAME.findall(node.meta.get("stack_trace") or "")
    for file, line in reversed(frames):
        targets = assignments(file).get(int(line))
        if targets:
            index = node.args[1] if node.target is operator.getitem else 0
            return targets[index if isinstance(index, int) and index < len(targets) else 0]
    path = module_path(node).split(".")[-1]
    return f"{path}_{node.name}" if path else node.name


def fresh_name(wanted: str, taken: Collection[str]) -> str:
    """Return a name that is not taken: the wanted one, or with a number behind it."""
    name, count = wanted, 1
    while name in taken:
        count += 1
        name = f"{wanted}_{count}"
    return name


def module_path(node: fx.Node) -> str:
    """Return the innermost module whose forward made a node, as the transformer names it."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return stack[-1][0].removeprefix("model").removeprefix(".") if stack else ""


def source_of(node: fx.Node) -> str:
    """Return ``file.py:line`` of the innermost source line that made a node."""
    frames = FRAME.findall(node.meta.get("stack_trace") or "")
    return f"{Path(frames[-1][0]).name}:{frames[-1][1]}" if frames else "unknown line"


@cache
def assignments(file: str) -> dict[int, tuple[str, ...]]:
    """Return line → names assigned by the statement that the line belongs to."""
    try:
        tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    except (OSError, SyntaxError):
        return {}
    found: dict[int, tuple[str, ...]] = {}
    for statement in ast.walk(tree):
        if isinstance(statement, ast.Assign):
            target = statement.targets[0]
            elements = target.elts if isinstance(target, ast.Tuple) else [target]
            names = tuple(e.id for e in elements if isinstance(e, ast.Name))
            if len(names) == len(elements):
                lines = range(statement.lineno, (statement.end_lineno or statement.lineno) + 1)
                found.update(dict.fromkeys(lines, names))
    return found
