# SPDX-License-Identifier: Apache-2.0
"""Name the sizes of values that go from graph to graph, and say how they follow from the latents'."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._sympy.functions import FloorDiv

from ...engines.base import TensorSpec
from .declared import DimFactor
from .refusal import refuse
from .row import Row, size_expression
from .trace import value_of
from .words import Cut, expression_of

__all__ = ["Dimensions"]


class Dimensions:
    """The names of a cut's sizes.

    Args:
        row: The model's row.
        cut: Its cut.
        config: Its config, with defaults.
        hidden: A node of ``hidden``'s shape, whose second dimension is named ``tokens``.

    Attributes:
        factors: Derived dimension → product of floor divisions of others.
        sums: Dimension → others whose sum it is; grows while values are named.
    """

    def __init__(self, row: Row, cut: Cut, config: Mapping[str, Any], hidden: fx.Node) -> None:
        self.row, self.cut, self.config = row, cut, config
        self.patches = row.sizes(config, dict.fromkeys(row.multiples, 1))
        self.sums: dict[str, tuple[str, ...]] = {}
        self.tokens = self._over_sizes(expression_of(value_of(hidden).shape[1]))
        self.factors: dict[str, tuple[DimFactor, ...]] = self._factors()

    def spec(self, node: fx.Node, dtype: torch.dtype, batch: str | int = "batch") -> TensorSpec:
        """Describe a value in a dtype; ``batch`` names its first dimension if that is the batch."""
        shape = tuple(self._dim(extent, batch) for extent in value_of(node).shape)
        return TensorSpec(str(dtype).removeprefix("torch."), shape)

    def of_word(self, word: str) -> str:
        """Name a dimension that a row spells."""
        expression = size_expression(word, self.config)
        if expression == self.tokens:
            return "tokens"
        if expression.is_Add:
            return self._sum(expression)
        if not word.isidentifier():
            refuse(self.cut.model, "takes an input of a size that has no name", [word])
        return word

    def derived(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """Add all that follows from the sizes that a model is traced with."""
        found = dict(sizes)
        if self.row.packed > 1:
            found |= {n: sizes.get(n, 1) * self.row.packed for n in ("height", "width")}
        for name, factors in self.factors.items():
            found[name] = 1
            for size, divisor in factors:
                found[name] *= found[size] // divisor
        return found | {n: sum(found[t] for t in terms) for n, terms in self.sums.items()}

    def limits(self) -> dict[str, int]:
        """Return how far each size of the latents may go, where the model has tables."""
        limits: dict[str, int] = {}
        multiples = {dim: by for factors in self.factors.values() for dim, by in factors}
        for one in self.cut.domain:
            condition = one.condition
            if isinstance(condition, sympy.Le) and condition.args[0].is_Symbol:
                name, most = str(condition.args[0]), condition.args[1]
                if name in ("frames", "height", "width") and most.is_Integer:
                    by = multiples.get(name, 1)
                    limits[name] = min(int(most) // by * by, limits.get(name, int(most)))
        return limits

    def _factors(self) -> dict[str, tuple[DimFactor, ...]]:
        """Say how tokens, and tokens of a frame, follow from the sizes of the latents."""
        if self.row.packed > 1:
            by = self.row.packed
            rows = {"rows": (("height", by),), "columns": (("width", by),)}
            shapes = " ".join(one.shape for one in self.cut.inputs.values())
            given = set(re.findall(r"[a-z_]\w*", shapes))
            return {
                **{n: f for n, f in rows.items() if n in given},
                "tokens": (("height", by), ("width", by)),
                "tokens_per_frame": (("tokens", 1),),
            }
        factors = tuple(self._factor(part) for part in sympy.Mul.make_args(self.tokens))
        order = ("frames", "height", "width")
        factors = tuple(sorted(factors, key=lambda f: order.index(f[0]) if f[0] in order else 3))
        per_frame = tuple(f for f in factors if f[0] != "frames")
        whole = {} if factors == (("tokens", 1),) else {"tokens": factors}
        return {**whole, "tokens_per_frame": per_frame}

    def _factor(self, part: sympy.Basic) -> DimFactor:
        """Return size and divisor of ``height`` or ``height // 2``."""
        size, divisor = part, 1
        if type(part).__name__ in ("FloorDiv", "CleanDiv"):
            size, divisor = part.args[0], int(part.args[1])
        if not size.is_Symbol:
            refuse(self.cut.model, "has tokens that are no product of sizes", [str(part)])
        return str(size), divisor

    def _over_sizes(self, expression: Any) -> Any:
        if not isinstance(expression, sympy.Basic):
            return expression
        expression = expression.xreplace(dict(self.cut.sizes))
        for size in expression.free_symbols:
            patch = self.patches.get(str(size), 1)  # it divides the size
            expression = expression.subs(patch * FloorDiv(size, patch), size)
        return expression

    def _dim(self, extent: Any, batch: str | int) -> str | int:
        """Return a dimension's name, or its size."""
        expression = self._over_sizes(expression_of(extent))
        if not isinstance(expression, sympy.Basic):
            return int(expression)
        if expression.is_Integer:
            return int(expression)
        if expression == self.tokens:
            return "tokens"
        if str(expression) == "batch":
            return batch
        if expression.is_Add:
            return self._sum(expression)
        if not expression.is_Symbol:
            refuse(
                self.cut.model, "hands on a value of a size that no input has", [str(expression)]
            )
        return str(expression)

    def _sum(self, expression: sympy.Basic) -> str:
        """Name the sum of two sequences' lengths."""
        rest = expression - self.tokens
        has_tokens = rest.count_ops() < expression.count_ops()
        others = sympy.Add.make_args(rest if has_tokens else expression)
        terms = sorted(str(one) for one in others) + ["tokens"] * has_tokens
        if not all(term.isidentifier() for term in terms):
            refuse(
                self.cut.model, "hands on a value of a size that no input has", [str(expression)]
            )
        name = "_plus_".join(terms)
        self.sums[name] = tuple(terms)
        return name
