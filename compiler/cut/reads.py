# SPDX-License-Identifier: Apache-2.0
"""Find what equal blocks read in one place, each a value of its own: a row of a table, a part of the prompt.

Any other argument of a template stands for one value, for a stream or a skip connection, or for what
each block's own context makes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from .names import fresh_name
from .refusal import refuse
from .streams import Streams
from .words import Call, Cut

__all__ = ["Reads", "find_reads"]

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
    runs: dict[str, str] = {name: one.changes for name, one in cut.inputs.items()}
    runs |= {name: cut.segments[call.segment].runs for call in cut.calls for name in call.outputs}
    for segment in cut.segments:
        calls = [call for call in cut.calls if call.segment == segment]
        handed_on = {*streams.inputs.get(segment, ()), *streams.skips.get(segment, ())}
        names = found.names.setdefault(segment, {})
        for i in _differing(calls, handed_on):
            values = {call.block: call.inputs[i] for call in calls}
            late = [
                f"{value} to {block}"
                for block, value in values.items()
                if runs[value] not in BEFORE_BLOCKS
            ]
            if late:
                refuse(cut.model, "hands equal blocks different values made at every step", late)
            same = (name for name, known in found.values.items() if known == values)
            word = f"{words[calls[0].inputs[i]]}_of_block"
            names[i] = next(same, None) or fresh_name(word, {*taken, *found.values})
            found.values[names[i]] = values
    return found


def _differing(calls: list[Call], handed_on: Collection[int]) -> list[int]:
    """Return the arguments that are not one value in all calls, nor what each block made itself."""
    return [
        i
        for i, values in enumerate(zip(*(call.inputs for call in calls), strict=True))
        if len(set(values)) > 1
        and i not in handed_on
        and not all(v.startswith(f"{c.block}.") for v, c in zip(values, calls, strict=True))
    ]
