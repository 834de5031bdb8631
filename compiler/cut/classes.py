# SPDX-License-Identifier: Apache-2.0
"""What each value depends on: any of latents, timestep and prompt, and the sizes that it needs.

An operation depends on all that its arguments do. A block's graph serves all of its instances, so
that a slot is as dynamic as the most dynamic value that any instance binds to it: a fixpoint.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy
from torch import fx

from .blocks import Instance, Template
from .trace import Trace, value_of
from .words import is_operation, is_size, sizes_of, sizes_read, tensors_read

__all__ = ["Classes", "Dependency", "classify"]


@dataclass(frozen=True)
class Dependency:
    """What a value depends on.

    Attributes:
        on: Any of ``step``, ``run`` and ``prompt``, as inputs are declared.
        sizes: Symbols that must be known beside those values.
    """

    on: frozenset[str] = frozenset()
    sizes: frozenset[sympy.Symbol] = frozenset()

    def __or__(self, other: Dependency) -> Dependency:
        """Return what two values together depend on."""
        return Dependency(self.on | other.on, self.sizes | other.sizes)


@dataclass(frozen=True)
class Classes:
    """Dependencies of a whole graph.

    Attributes:
        of: Node → what it depends on; inside blocks, of any instance of the template.
        known_with: ``step``, ``run`` or ``prompt`` → symbols that such inputs' shapes have.
    """

    of: dict[fx.Node, Dependency]
    known_with: dict[str, set[sympy.Symbol]]

    def runs(self, node: fx.Node) -> str:
        """Return the seldomest moment at which a value can be computed."""
        found = self.of[node]
        if "step" in found.on:
            return "step"
        if found.on == {"run"} and found.sizes <= self.known_with["run"]:
            return "run"
        if "run" in found.on:
            return "condition"
        if "prompt" in found.on:
            return "prompt" if found.sizes <= self.known_with["prompt"] else "prompt_shape"
        return "shape" if found.sizes else "build"


def classify(trace: Trace, templates: list[Template]) -> Classes:
    """Find what each value depends on."""
    owner = {node: i for t in templates for i in t.instances for node in i.nodes}
    joined: dict[tuple[str, fx.Node], Dependency] = {}
    while True:
        of = _flow(trace, owner, joined)
        before = dict(joined)
        for template in templates:
            for bound in zip(*(i.slots for i in template.instances), strict=True):
                together = Dependency()
                for node in bound:
                    together |= of[node]
                for instance, node in zip(template.instances, bound, strict=True):
                    joined[instance.block, node] = together
        if joined == before:
            return Classes(of, _known_with(trace))


def _flow(
    trace: Trace,
    owner: dict[fx.Node, Instance],
    joined: dict[tuple[str, fx.Node], Dependency],
) -> dict[fx.Node, Dependency]:
    """Pass dependencies from inputs to results once."""
    of: dict[fx.Node, Dependency] = {}
    for node in trace.graph.nodes:
        if node.op == "placeholder":
            declared = trace.declared.get(node)
            known = declared is not None and declared.changes != "shape"
            of[node] = Dependency(
                frozenset({declared.changes}) if declared and known else frozenset()
            )
        elif is_operation(node):
            sizes = {s for e in sizes_read(node) for s in getattr(e, "free_symbols", ())}
            found = Dependency(frozenset(), frozenset(sizes))
            block = owner[node].block if node in owner else ""
            for read in tensors_read(node):
                found |= joined.get((block, read), of[read])
            of[node] = found
    return of


def _known_with(trace: Trace) -> dict[str, set[Any]]:
    known: dict[str, set[Any]] = {"step": set(), "run": set(), "prompt": set()}
    for node, declared in trace.declared.items():
        if declared.changes != "shape" and not is_size(node) and value_of(node) is not None:
            known[declared.changes] |= sizes_of(node)
    return known
