# SPDX-License-Identifier: Apache-2.0
"""What each value depends on: any of latents, timestep and prompt, and the sizes that it needs.

An operation depends on all that its arguments do. A block's graph serves all of its instances, so
that a slot is as dynamic as the most dynamic value that any instance binds to it: a fixpoint.
Constants that differ from block to block are values of the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sympy
from torch import Tensor, fx

from .trace import Trace, value_of
from .words import (
    Instance,
    Template,
    is_operation,
    sizes_of,
    sizes_read,
    tensors_read,
)

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

    @property
    def every_step(self) -> bool:
        """Whether a value sees the latents, or both the timestep and the prompt."""
        return "step" in self.on or self.on >= {"run", "prompt"}


@dataclass(frozen=True)
class Classes:
    """Dependencies of a whole graph.

    Attributes:
        of: Node → what it depends on; inside blocks, of any instance of the template.
        batch: Symbols that timesteps' shapes have.
        latents: Symbols that the latents' shapes have.
        conditioning: Values that see the timestep, no latent and no token, all the way from it: a
            vector a step, of which all steps' can be computed in one batch.
    """

    of: dict[fx.Node, Dependency]
    batch: set[sympy.Symbol]
    latents: set[sympy.Symbol]
    conditioning: set[fx.Node]

    def runs(self, node: fx.Node) -> str:
        """Return the seldomest moment at which a value can be computed.

        What needs a size that no latents have (the text's) is known with the prompt.
        """
        found = self.of[node]
        if found.every_step:
            return "step"
        if "run" in found.on:
            return "run" if found.sizes <= self.batch else "step"
        if "prompt" in found.on or not found.sizes <= self.latents:
            return "prompt"
        return "shape" if found.sizes else "constant"


def classify(trace: Trace, templates: Sequence[Template] = ()) -> Classes:
    """Find what each value depends on.

    Args:
        trace: The traced graph.
        templates: Blocks that share a graph; without them each block is taken for itself.
    """
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
                if together == Dependency() and len(set(bound)) > 1:
                    together = Dependency(frozenset({"prompt"}))
                    joined |= {("", node): together for node in bound}
                for instance, node in zip(template.instances, bound, strict=True):
                    joined[instance.block, node] = together
        if joined == before:
            batch = _symbols_of(trace, "run")
            latents = _symbols_of(trace, "step")
            return Classes(of, batch, latents, _conditioning(trace, of, batch))


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
            found = joined.get(("", node), Dependency()) | Dependency(frozenset(), frozenset(sizes))
            block = owner[node].block if node in owner else ""
            for read in tensors_read(node):
                found |= joined.get((block, read), of[read])
            of[node] = found
    return of


def _conditioning(
    trace: Trace, of: dict[fx.Node, Dependency], batch: set[sympy.Symbol]
) -> set[fx.Node]:
    found: set[fx.Node] = set()
    for node in trace.graph.nodes:
        if node not in of or "run" not in of[node].on or "step" in of[node].on:
            continue
        sizes = {s for e in sizes_read(node) for s in getattr(e, "free_symbols", ())}
        if isinstance(value_of(node), Tensor):
            sizes |= sizes_of(node)
        seen = [n for n in tensors_read(node) if "run" in of[n].on]
        if sizes <= batch and found.issuperset(seen):
            found.add(node)
    return found


def _symbols_of(trace: Trace, changes: str) -> set[sympy.Symbol]:
    """Return the symbols in the shapes of the inputs that change so."""
    inputs = [node for node, declared in trace.declared.items() if declared.changes == changes]
    return {symbol for node in inputs for symbol in sizes_of(node)}
