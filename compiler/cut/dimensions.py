# SPDX-License-Identifier: Apache-2.0
"""Name the sizes of values that go from graph to graph, and say how they follow from the latents'."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._sympy.functions import FloorDiv, PythonMod

from ...bundle.dims import all_dims
from ...bundle.manifest import SumTerm
from ...engines.base import TensorSpec
from .declared import DimFactor
from .refusal import refuse
from .row import Row, size_expression
from .trace import value_of
from .words import Cut, expression_of

__all__ = ["Dimensions"]

MOST_TIMES = 8
"""How often a size may count in a sum: two values a token are two sequences, eight are a latent's
pixels, a hundred are neither."""


class Dimensions:
    """The names of a cut's sizes.

    Args:
        row: The model's row.
        cut: Its cut.
        config: Its config, with defaults.
        hidden: A node of ``hidden``'s shape, whose second dimension is named ``tokens``.

    Attributes:
        factors: Derived dimension → product of floor divisions of others.
        sums: Dimension → what it is the sum of. Both grow while values are named.
    """

    def __init__(self, row: Row, cut: Cut, config: Mapping[str, Any], hidden: fx.Node) -> None:
        self.row, self.cut, self.config = row, cut, config
        self.patches = row.sizes(config, dict.fromkeys(row.multiples, 1))
        self.sums: dict[str, tuple[SumTerm, ...]] = {}
        self.tokens = sympy.sympify(self._over_sizes(expression_of(value_of(hidden).shape[1])))
        self.factors: dict[str, tuple[DimFactor, ...]] = {}
        self.factors |= self._factors()

    def spec(self, node: fx.Node, dtype: torch.dtype, batch: str | int = "batch") -> TensorSpec:
        """Describe a value in a dtype; ``batch`` names its first dimension if that is the batch."""
        shape = tuple(self._dim(extent, batch) for extent in value_of(node).shape)
        return TensorSpec(str(dtype).removeprefix("torch."), shape)

    def of_word(self, word: str) -> str | int:
        """Name a dimension that a row spells."""
        expression = size_expression(word, self.config)
        return self._name(expression, "takes an input of a size that has no name")

    def derived(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """Add all that follows from the sizes that a model is traced with."""
        found = dict(sizes)
        if self.row.packed:
            found |= {n: sizes.get(n, 1) * self.row.packed for n in ("height", "width")}
        return all_dims(self.factors, self.sums, found)

    def _factors(self) -> dict[str, tuple[DimFactor, ...]]:
        """Say how tokens, and tokens of a frame, follow from the sizes of the latents."""
        if self.row.packed:
            by = self.row.packed
            rows = {"rows": (("height", by),), "columns": (("width", by),)}
            shapes = " ".join(one.shape for one in self.cut.inputs.values())
            given = set(re.findall(r"[a-z_]\w*", shapes))
            self.factors |= {n: f for n, f in rows.items() if n in given}
            image: dict[str, tuple[DimFactor, ...]] = {"tokens_per_frame": (("tokens", 1),)}
            if len(sympy.Add.make_args(self.tokens)) > 1:  # a text's beside the image's
                self.sums["tokens"] = self._summed_tokens()
                return image
            return {"tokens": (("height", by), ("width", by)), **image}
        factors = self._product(self.tokens)
        if factors is None:  # one frame of so many
            terms = self._summed_tokens()
            self.sums |= {"tokens": terms, "tokens_per_frame": terms}
            return {}
        order = ("frames", "height", "width")
        factors = tuple(sorted(factors, key=lambda f: order.index(f[0]) if f[0] in order else 3))
        per_frame = tuple(f for f in factors if f[0] != "frames")
        given = {word for one in self.cut.inputs.values() for word in one.shape.split()}
        if not given.issuperset(
            size for size, _ in per_frame
        ):  # tokens are given, and no size else
            per_frame = (("tokens", 1),)
        whole = {} if factors == (("tokens", 1),) else {"tokens": factors}
        return {**whole, "tokens_per_frame": per_frame}

    def _summed_tokens(self) -> tuple[SumTerm, ...]:
        """Return what tokens are the sum of, where no product makes them."""
        return self._terms(self.tokens, "has tokens of a number that no input has")

    def _product(self, expression: Any) -> tuple[DimFactor, ...] | None:
        """Return sizes and divisors of ``frames * (height // 2)``; None of anything else."""
        factors = []
        for part in sympy.Mul.make_args(sympy.sympify(expression)):
            is_part = type(part).__name__ in ("FloorDiv", "CleanDiv")
            size, divisor = part.args if is_part else (part, 1)
            if not size.is_Symbol or not sympy.sympify(divisor).is_Integer:
                return None
            factors.append((str(size), int(divisor)))
        return tuple(factors)

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
        name = self._name(expression, "hands on a value of a size that no input has")
        return batch if name == "batch" else name

    def _name(self, expression: Any, what: str) -> str | int:
        """Name a size, and say how it follows from those of the inputs.

        Args:
            expression: The size, over the names of `SIZES`.
            what: Said of a size that does not: "takes an input of a size that has no name".
        """
        expression = sympy.sympify(expression)
        if expression.is_Integer:
            return int(expression)
        if expression == self.tokens:
            return "tokens"
        if expression.is_Symbol:
            return str(expression)
        factors = self._product(expression) or self._product(sympy.expand(expression))
        if factors is not None:
            name = "_times_".join(n if by == 1 else f"{n}_over_{by}" for n, by in factors)
            self.factors[name] = factors
            return name
        rest = expression - self.tokens
        has_tokens = rest.count_ops() < expression.count_ops()
        terms = self._terms(rest if has_tokens else expression, what)
        counts = Counter(map(_spelled, terms))
        words = [term if n == 1 else f"{term}_times_{n}" for term, n in counts.items()]
        name = "_plus_".join([*words, *(["tokens"] * has_tokens)]).replace("plus_-", "minus_")
        if has_tokens:
            terms = (*terms, *self.sums.get("tokens", ("tokens",)))
        self.sums[name] = terms
        return name

    def _terms(self, expression: Any, what: str) -> tuple[SumTerm, ...]:
        """Return what a size is the sum of: dimensions, padded ones, a number."""
        rest = expression
        padded: list[SumTerm] = []
        for padding in sorted(rest.atoms(PythonMod), key=str):  # x + (-x) % n is x rounded up
            size, multiple = -padding.args[0], padding.args[1]
            padded.append((str(self._name(size, what)), int(multiple)))
            rest -= size + padding
        counted = [term.as_coeff_Mul() for term in sympy.Add.make_args(rest)]
        number = sum(int(count) for count, one in counted if one == 1)
        plain = [(int(count), one) for count, one in counted if one != 1 and count != 0]
        known = all(one.is_Symbol or self._product(one) for _, one in plain)
        if not known or any(not 0 < count <= MOST_TIMES for count, _ in plain):
            refuse(self.cut.model, what, [str(expression)])
        names = sorted(str(self._name(one, what)) for count, one in plain for _ in range(count))
        return (*names, *padded, *([number] if number else []))


def _spelled(term: SumTerm) -> str:
    return f"{term[0]}_up_to_{term[1]}" if isinstance(term, tuple) else str(term)
