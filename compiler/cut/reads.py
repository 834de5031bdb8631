# SPDX-License-Identifier: Apache-2.0
"""Find what equal blocks read in one place, each a value of its own: a row of a table, a part of the prompt.

Any other argument of a template stands for one value, for a stream or a skip connection, or for what
each block's own context makes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .names import fresh_name
from .refusal import refuse
from .streams import Streams
from .words import Cut

__all__ = ["Reads", "find_reads", "late_values", "own_places"]

BEFORE_BLOCKS = ("shape", "prompt", "run")
"""Moments of values that are there before any block runs."""


@dataclass
class Reads:
    """Values that blocks of one template read each for itself.

    Attributes:
        names: Segment → position of an argument → its name.
        values: That name → block → the value that it reads.
    """

    names: dict[str, dict[int, str]] = field(default_factory=dict)
    values: dict[str, dict[str, str]] = field(default_factory=dict)


def own_places(cut: Cut, segment: str) -> dict[int, dict[str, str]]:
    """Return the arguments of which each block reads another value, with these by block.

    Values that a block makes for itself, as its context does, are none.
    """
    calls = [call for call in cut.calls if call.segment == segment]
    return {
        i: {call.block: value for call, value in zip(calls, values, strict=True)}
        for i, values in enumerate(zip(*(call.inputs for call in calls), strict=True))
        if len(set(values)) > 1
        and not all(v.startswith(f"{c.block}.") for v, c in zip(values, calls, strict=True))
    }


def late_values(cut: Cut, values: Mapping[str, str]) -> list[str]:
    """Return which of the values that blocks read is not there before any block runs."""
    runs: dict[str, str] = {name: one.changes for name, one in cut.inputs.items()}
    runs |= {name: cut.segments[call.segment].runs for call in cut.calls for name in call.outputs}
    return [f"{v} to {block}" for block, v in values.items() if runs[v] not in BEFORE_BLOCKS]


def find_reads(cut: Cut, streams: Streams, words: Mapping[str, str]) -> Reads:
    """Name each argument that stands for another value in each block: ``temb_of_block``.

    Args:
        cut: The cut.
        streams: What blocks hand on, which is no value of their own.
        words: Value → the bundle's name for it.

    Raises:
        ExportError: such a value is made by a block, or at every step.
    """
    found = Reads()
    taken = {*words.values(), *streams.of.values()}
    for segment in cut.segments:
        handed_on = {*streams.inputs.get(segment, ()), *streams.skips.get(segment, ())}
        names = found.names.setdefault(segment, {})
        for i, values in own_places(cut, segment).items():
            if i in handed_on:
                continue
            if late := late_values(cut, values):
                refuse(cut.model, "hands equal blocks different values made at every step", late)
            same = (name for name, known in found.values.items() if known == values)
            first = next(iter(values.values()))
            word = fresh_name(f"{words[first]}_of_block", {*taken, *found.values})
            names[i] = next(same, word)
            found.values[names[i]] = values
    return found
