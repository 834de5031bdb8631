# SPDX-License-Identifier: Apache-2.0
"""Refuse a cut that a bundle has no word for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, NoReturn

import sympy

from ...core.errors import ExportError
from .row import SIZES, Row
from .words import Cut

__all__ = ["refuse", "refuse_what_has_no_word"]

SMALL = 3
"""Patches in each dimension up to which sizes are tried for a branch that was not traced."""


def refuse(model: str, what: str, names: Sequence[str] = ()) -> NoReturn:
    """Say what of a transformer can't be written into a bundle.

    Args:
        model: The transformer's class.
        what: Said of the transformer: "has no blocks".
        names: Values or graphs that it is about.

    Raises:
        ExportError: always.
    """
    raise ExportError(
        f"transformer '{model}'",
        what + (f": {', '.join(names)}" if names else ""),
        "a bundle has no word for that yet",
    )


def refuse_what_has_no_word(row: Row, cut: Cut, config: Mapping[str, Any]) -> None:
    """Refuse a cut that needs a graph or a value that no bundle has.

    Args:
        row: What the transformer takes.
        cut: Its cut.
        config: Its config.

    Raises:
        ExportError: says which graph, value or line of source stands in the way.
    """
    model = cut.model
    steps = [n for n, one in cut.inputs.items() if one.changes == "step"]
    runs = [n for n, one in cut.inputs.items() if one.changes == "run"]
    if not steps:
        refuse(model, "takes no input that changes at every step")
    if len({cut.inputs[n].of for n in runs}) != len(runs) or not runs:
        refuse(model, f"takes {len(runs)} timesteps", runs)
    of_many = [n for n in runs if cut.inputs[n].shape not in ("batch", str(len(cut.inputs[n].of)))]
    if of_many:
        refuse(model, "conditions its tokens on several timesteps at once", of_many)
    if len(cut.results) != len(steps):
        refuse(model, f"returns {len(cut.results)} values for {len(steps)} latents", cut.results)
    if not any(call.block for call in cut.calls):
        refuse(model, "has no blocks")
    if not any(segment.runs == "prompt" for segment in cut.segments.values()):
        refuse(model, "makes nothing of the prompt alone")
    for call in cut.calls:
        if not set(runs).isdisjoint(call.inputs) and cut.segments[call.segment].runs != "run":
            refuse(model, "reads a timestep where no table of its steps is", [call.segment])
    patches = row.sizes(config, dict.fromkeys(SIZES, 1))
    for one in (a for a in cut.domain if a.by_model):  # torch asks which strides to choose
        sizes = _breaks(one.condition, patches)
        if sizes is not None:
            refuse(model, f"computes otherwise at {sizes}", [one.where])


def _breaks(condition: sympy.Basic, patches: Mapping[str, int]) -> str | None:
    """Return small sizes at which the traced branch is not the model's, if there are any.

    What breaks at large sizes alone is a table's length: the engine has no row for it.
    """
    symbols = sorted(condition.free_symbols, key=str)
    for counts in product(range(1, SMALL + 1), repeat=len(symbols)):
        sizes = {s: n * patches.get(str(s), 1) for s, n in zip(symbols, counts, strict=True)}
        if condition.xreplace(sizes) == sympy.false:
            return ", ".join(f"{size} = {value}" for size, value in sizes.items())
    return None
