# SPDX-License-Identifier: Apache-2.0
"""What a trace takes for granted about sizes, with the line of the model that did."""

from __future__ import annotations

import contextlib
import importlib
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import sympy

__all__ = ["Assumption", "collected_assumptions", "over_sizes"]

ASSERTING_MODULES = (
    "torch._export.utils",
    "torch.export.exported_program",
    "torch.fx.passes.runtime_assert",
)
"""Where torch writes an assertion into a graph for each assumption about sizes."""

MOST = 2**31
"""A size below this is a bound."""

SAMPLES = (1, 2, 3, 8, 100, 5_000, 1_000_000)
"""Sizes that an assumption is tried at."""


@dataclass(frozen=True)
class Assumption:
    """A branch that Python took on a size: the graph is right where ``condition`` holds.

    Attributes:
        condition: Over the names of `row.SIZES`.
        where: Source file and line.
        by_model: Whether the model's source asks, not an operation of torch's.
    """

    condition: sympy.Basic
    where: str
    by_model: bool = False


@contextlib.contextmanager
def collected_assumptions() -> Iterator[list[Assumption]]:
    """Collect what is taken for granted about sizes, where torch would write assertions of it."""
    found: dict[Any, Assumption] = {}
    collected: list[Assumption] = []

    def collect(_module: Any, environment: Any, *_: Any, **__: Any) -> None:
        for checks in environment.deferred_runtime_asserts.values():
            for check in checks:
                if check.expr not in found:
                    found[check.expr] = _assumption(check.expr, check.stack.summary())

    with contextlib.ExitStack() as stack:
        for name in ASSERTING_MODULES:
            module = importlib.import_module(name)
            if hasattr(module, "insert_deferred_runtime_asserts"):
                stack.enter_context(
                    patch.object(module, "insert_deferred_runtime_asserts", collect)
                )
        yield collected
    collected += (one for one in found.values() if _may_fail(one))


def _assumption(condition: sympy.Basic, frames: Sequence[Any]) -> Assumption:
    """Return an assumption with the innermost line of diffusers that led to it."""
    asked = [f for f in frames if "torch/fx/experimental" not in f.filename]
    asked = [f for f in asked if not f.filename.endswith("torch/__init__.py")]
    inside = [f for f in asked if "/diffusers/" in f.filename]
    where = f"{Path(inside[-1].filename).name}:{inside[-1].lineno}" if inside else ""
    return Assumption(condition, where, by_model=bool(inside) and inside[-1] is asked[-1])


def over_sizes(
    domain: Iterable[Assumption], symbols: Mapping[sympy.Symbol, sympy.Basic], environment: Any
) -> tuple[Assumption, ...]:
    """Write assumptions over a row's sizes; those that its names already say are left out."""
    upper = {s: environment.var_to_range[s].upper for s, name in symbols.items() if name.is_Symbol}
    limits = [
        Assumption(sympy.Le(symbol, most), "a table's length")
        for symbol, most in upper.items()
        # `torch.as_tensor(size)` bounds a size by the traced one; proofs go beyond that one.
        if most.is_Integer and most < MOST and most != environment.backed_var_to_val.get(symbol)
    ]
    equal = dict(environment.replacements)
    named = [
        replace(one, condition=one.condition.xreplace(equal).xreplace(symbols))
        for one in (*domain, *limits)
    ]
    return tuple(one for one in named if one.condition != sympy.true)


def _may_fail(assumption: Assumption) -> bool:
    """Say whether some sizes break an assumption.

    What chooses strides breaks nothing: the graph is right either way (every cut is proved at sizes of 1).
    """
    condition = assumption.condition
    if not assumption.where:  # asked again when the graph was made functional
        return False
    if not assumption.by_model and _chooses_strides(condition):
        return False
    symbols = sorted(assumption.condition.free_symbols, key=str)
    draw = random.Random(0)
    for _ in range(40):
        sizes = {symbol: sympy.Integer(draw.choice(SAMPLES)) for symbol in symbols}
        try:
            if assumption.condition.xreplace(sizes) == sympy.false:
                return True
        except ZeroDivisionError:  # a latent smaller than one patch: no such size is run
            continue
    return False


def _chooses_strides(condition: sympy.Basic) -> bool:
    """Say whether torch asks if extents differ, if one is 0 or 1, or which of two strides is longer."""
    if isinstance(condition, sympy.Ne):
        return True
    if not isinstance(condition, (sympy.Le, sympy.Lt)):
        return False
    sides = (sympy.Mul.make_args(side) for side in condition.args)
    return condition.args[0] == 1 or all(
        type(factor).__name__ == "Max" and 1 in factor.args for side in sides for factor in side
    )
