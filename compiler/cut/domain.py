# SPDX-License-Identifier: Apache-2.0
"""How far sizes may go: a model's tables of positions end somewhere, and its graphs with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import sympy
from torch import fx

from ...bundle.manifest import LimitEntry
from .assumptions import Assumption
from .declared import DimFactor
from .names import module_path, source_of
from .trace import Trace
from .words import is_operation, sizes_read

__all__ = ["limits_of", "place_limits"]


def place_limits(trace: Trace) -> None:
    """Say of each assumption that bounds one size where in the model it arises.

    That is the first operation that takes as much of a table, or of what is made of tables alone, as the
    size says.
    """
    trace.domain = tuple(
        replace(one, where=_place(trace, one.condition.args[0]) or one.where)
        if _is_bound(one) and not one.by_model
        else one
        for one in trace.domain
    )


def limits_of(
    domain: Sequence[Assumption], factors: Mapping[str, Sequence[DimFactor]]
) -> dict[str, LimitEntry]:
    """Return the largest size of each dimension that a table bounds.

    Args:
        domain: What tracing took for granted about sizes.
        factors: Derived dimension → its factors: sizes are whole patches.
    """
    multiples = {dim: by for parts in factors.values() for dim, by in parts}
    limits: dict[str, LimitEntry] = {}
    for one in filter(_is_bound, domain):
        name, most = str(one.condition.args[0]), int(one.condition.args[1])
        by = multiples.get(name, 1)
        limit = LimitEntry(most=most // by * by, where=one.where)
        limits[name] = min(limit, limits.get(name, limit), key=lambda found: found.most)
    return limits


def _is_bound(one: Assumption) -> bool:
    """Say whether an assumption is that one size is a number at most."""
    condition = one.condition
    return (
        isinstance(condition, sympy.Le)
        and condition.args[0].is_Symbol
        and bool(condition.args[1].is_Integer)
    )


def _place(trace: Trace, size: sympy.Basic) -> str:
    """Return module and source line of the first operation that takes part of a table by a size."""
    tables: set[fx.Node] = {*trace.constants, *trace.weights}
    symbols = {symbol for symbol, name in trace.symbols.items() if name == size}
    for node in trace.graph.nodes:
        read = set(node.all_input_nodes) & tables
        if not is_operation(node) or not read:
            continue
        asked = {s for e in sizes_read(node) for s in getattr(e, "free_symbols", ())}
        if not symbols.isdisjoint(asked):
            return f"module '{module_path(node)}' ({source_of(node)})"
        if all(n in tables for n in node.all_input_nodes):
            tables.add(node)
    return ""
