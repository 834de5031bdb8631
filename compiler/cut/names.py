# SPDX-License-Identifier: Apache-2.0
"""Name a value as the model's own source names it.

A traced node knows the source lines it came from. A line that belongs to an assignment gives the name:
`timestep_proj = self.time_proj(...)` is ``timestep_proj`` in every graph and table. Of nested calls the
one counts whose module also reads the value: what `time_proj` calls it inside itself is its own affair.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Collection
from functools import cache
from itertools import takewhile
from pathlib import Path

from torch import fx

from .words import is_operation, operation

__all__ = ["fresh_name", "module_path", "source_of", "value_name"]

FRAME = re.compile(r'File "([^"]+)", line (\d+)(?:, in (\w+))?')

TRANSFORMER = 2
"""Depth of the transformer's own `forward` among modules: what watches its blocks lies around it."""


OPERANDS = ("query", "key", "value", "mask")
"""What attention reads, in the order of its arguments."""


def value_name(node: fx.Node) -> str:
    """Return the variable that a value is assigned to, else its module and operation.

    What an attention reads is its key or its value, whatever the variable was that held it.
    """
    if "value_name" in node.meta:
        return str(node.meta["value_name"])
    if (operand := _attention_operand(node)) is not None:
        return operand
    lines = [(assignments(file).get(line, ()), False) for file, line in _lines(node)]
    lines += [(names, True) for names, _ in lines]
    is_element = node.target is operator.getitem
    for names, take_any in lines:
        if names and (is_element or take_any or len(names) == 1):
            index = node.args[1] if is_element else 0
            return names[index if isinstance(index, int) and index < len(names) else 0]
    module = _module_name(node)
    return f"{module}_{node.name}" if module else node.name


def _attention_operand(node: fx.Node) -> str | None:
    """Return ``attn2_key`` of what an attention of module ``attn2`` reads as its key."""
    for user in node.users:
        if is_operation(user) and operation(user) == "scaled_dot_product_attention":
            module = _module_name(user)
            found = [w for w, read in zip(OPERANDS, user.args, strict=False) if read is node]
            if module and found:
                return f"{module}_{found[0]}"
    return None


def _module_name(node: fx.Node) -> str:
    """Return the name of a node's innermost module; of a list's entry, with its list's before it."""
    *outer, name = module_path(node).split(".")
    while outer and name[0].isdigit():
        name = f"{outer.pop()}_{name}"
    return name


def _lines(node: fx.Node) -> list[tuple[str, int]]:
    """Return source lines: of the innermost module that also reads a value, inside of it, around it.

    Each module of a node's stack has one frame of a function `forward`.
    """
    modules = _modules(node)
    shared = [_shared(modules, _modules(user)) for user in node.users if is_operation(user)]
    depth = max(shared, default=TRANSFORMER)
    forwards = 0
    own, inner, outer = list[tuple[str, int]](), list[tuple[str, int]](), list[tuple[str, int]]()
    for file, line, function in FRAME.findall(node.meta.get("stack_trace") or ""):
        forwards += function == "forward"
        part = own if forwards == depth else inner if forwards > depth else outer
        if forwards >= TRANSFORMER:
            part.append((file, int(line)))
    return [*reversed(own), *inner, *reversed(outer)]


def _shared(modules: list[str], others: list[str]) -> int:
    """Return how many modules two stacks begin with alike."""
    pairs = zip(modules, others, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _modules(node: fx.Node) -> list[str]:
    return [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]


def fresh_name(wanted: str, taken: Collection[str]) -> str:
    """Return a name that is not taken: the wanted one, or with a number behind it."""
    name, count = wanted, 1
    while name in taken:
        count += 1
        name = f"{wanted}_{count}"
    return name


def module_path(node: fx.Node) -> str:
    """Return the innermost module whose forward made a node, as the transformer names it."""
    modules = _modules(node)
    return modules[-1].removeprefix("model").removeprefix(".") if modules else ""


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
