# SPDX-License-Identifier: Apache-2.0
"""Make symbolic sizes anew inside a segment, from the shapes of its own inputs.

No size crosses a segment's border. A dimension that is linear in one symbol is solved for it; a
composite one (`frames * (height // 2) * (width // 2)`) stands for itself. Where no input of a
segment has a size, one of the transformer's own inputs is taken in addition, for its shape alone.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.utils._sympy.functions import FloorDiv

from .trace import value_of
from .words import expression_of

__all__ = ["SizeMaker", "shape_donors"]

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "Add": operator.add, "Mul": operator.mul, "FloorDiv": operator.floordiv,
    "CleanDiv": operator.floordiv, "Mod": operator.mod, "PythonMod": operator.mod,
    "Max": torch.sym_max, "Min": torch.sym_min, "ToFloat": torch.sym_float,
    "IntTrueDiv": operator.truediv, "FloatTrueDiv": operator.truediv, "TruncToInt": torch.sym_int,
    "FloatPow": operator.pow, "PowByNatural": operator.pow, "RoundToInt": round,
    "CeilToInt": math.ceil, "FloorToInt": math.floor,
}  # fmt: skip
"""Function in a symbolic size's expression → what computes it; of many arguments, by pairs."""


def extents(node: fx.Node) -> list[tuple[int | None, sympy.Basic]]:
    """Return axis and expression of each symbolic dimension; of a size itself, axis None."""
    value = value_of(node)
    if not isinstance(value, Tensor):
        return [(None, expression_of(value))] if isinstance(value, torch.SymInt) else []
    return [
        (axis, expression_of(extent))
        for axis, extent in enumerate(value.shape)
        if isinstance(extent, torch.SymInt)
    ]


def line(expression: sympy.Basic) -> tuple[sympy.Symbol, int, int] | None:
    """Return symbol, factor and offset of an expression linear in one symbol, else None."""
    symbols = expression.free_symbols
    if len(symbols) != 1 or not expression.is_polynomial():
        return None
    (symbol,) = symbols
    coefficients = sympy.Poly(expression, symbol).all_coeffs()
    return (symbol, *map(int, coefficients)) if len(coefficients) == 2 else None


def shape_donors(
    wanted: Iterable[Any], inputs: list[fx.Node], user_inputs: Iterable[fx.Node]
) -> list[fx.Node]:
    """Return the transformer's inputs that a segment must take for their shapes alone.

    Raises:
        LookupError: no input has a size; carries the symbol.
    """
    composite = _composites(inputs)
    expressions = [_local(e, composite) for e in wanted]
    own = {symbol for symbol, _, _ in composite.values()}
    symbols = {s for e in expressions for s in getattr(e, "free_symbols", ())} - own
    donors: list[fx.Node] = []
    for symbol in sorted(symbols, key=str):
        if any(_gives(node, symbol) for node in (*inputs, *donors)):
            continue
        donor = next((node for node in user_inputs if _gives(node, symbol)), None)
        if donor is None:
            raise LookupError(symbol)
        donors.append(donor)
    return donors


def _gives(node: fx.Node, symbol: sympy.Symbol) -> bool:
    lines = (line(expression) for _, expression in extents(node))
    return any(found is not None and found[0] == symbol for found in lines)


Composites = Mapping[Any, tuple[sympy.Symbol, fx.Node, int]]


def _composites(inputs: Iterable[fx.Node]) -> Composites:
    """Return each composite dimension, longest first: a symbol for it, and where it stands."""
    found: dict[Any, tuple[sympy.Symbol, fx.Node, int]] = {}
    for node in inputs:
        for axis, expression in extents(node):
            if axis is not None and line(expression) is None and expression not in found:
                symbol = sympy.Symbol(f"extent{len(found)}", integer=True, positive=True)
                found[expression] = (symbol, node, axis)
    return dict(sorted(found.items(), key=lambda item: -item[0].count_ops()))


def _local(expression: Any, composite: Composites) -> Any:
    """Write an expression over a segment's own composite dimensions, where it has them."""
    if isinstance(expression, sympy.Basic):
        for whole, (symbol, _, _) in composite.items():
            expression = expression.subs(whole, symbol)
    return expression


class SizeMaker:
    """Adds to a segment's graph what computes symbolic sizes, each once.

    Args:
        graph: The segment's.
        inputs: Node of the traced graph → placeholder of the segment, donors of shapes last.
    """

    def __init__(self, graph: fx.Graph, inputs: Mapping[fx.Node, fx.Node]) -> None:
        self.graph = graph
        self.inputs = inputs
        self.composite = _composites(inputs)
        self.made: dict[Any, Any] = {
            symbol: (inputs[node], axis) for symbol, node, axis in self.composite.values()
        }

    def __call__(self, expression: Any) -> Any:
        """Return the node of the segment, or the number, that is an expression's value."""
        return self._make(_local(expression, self.composite))

    def _make(self, expression: Any) -> Any:
        if not isinstance(expression, sympy.Basic):
            return expression
        if expression.is_Integer:
            return int(expression)
        if expression.is_Float:
            return float(expression)
        made = self.made.get(expression)
        if made is None or isinstance(made, tuple):
            if made is not None:
                made = self._extent(*made)
            elif expression.is_Symbol:
                made = self._solve(expression)
            else:
                made = self._compute(expression)
            self.made[expression] = made
        return made

    def _extent(self, placeholder: fx.Node, axis: int | None) -> fx.Node:
        if axis is None:
            return placeholder
        return self.graph.call_function(torch.ops.aten.sym_size.int, (placeholder, axis))

    def _solve(self, symbol: sympy.Symbol) -> fx.Node:
        """Return a symbol's value: (extent - offset) // factor."""
        for node, placeholder in self.inputs.items():
            for axis, expression in extents(node):
                found = line(expression)
                if found is not None and found[0] == symbol:
                    size = self._extent(placeholder, axis)
                    _, factor, offset = found
                    if offset:
                        size = self.graph.call_function(operator.sub, (size, offset))
                    if factor != 1:
                        size = self.graph.call_function(operator.floordiv, (size, factor))
                    return size
        raise LookupError(symbol)

    def _compute(self, expression: Any) -> Any:
        if isinstance(expression, FloorDiv) and expression.args[0].could_extract_minus_sign():
            # ⌊−x / n⌋ is −⌊(x + n − 1) / n⌋: ONNX divides towards zero, Python towards −∞.
            top, bottom = expression.args
            floor = self._apply(
                operator.floordiv, self._make(-top + bottom - 1), self._make(bottom)
            )
            return self._apply(operator.mul, floor, -1)
        arguments = [self._make(argument) for argument in expression.args]
        name = type(expression).__name__
        if name == "Pow":
            name, arguments = "Mul", arguments[:1] * int(arguments[1])
        function = FUNCTIONS[name]
        if len(arguments) == 1:
            return (
                self._apply(function, arguments[0]) if name not in ("Add", "Mul") else arguments[0]
            )
        result = arguments[0]
        for argument in arguments[1:]:
            result = self._apply(function, result, argument)
        return result

    def _apply(self, function: Callable[..., Any], *arguments: Any) -> Any:
        if any(isinstance(argument, fx.Node) for argument in arguments):
            return self.graph.call_function(function, arguments)
        return function(*arguments)
