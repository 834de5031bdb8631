# SPDX-License-Identifier: Apache-2.0
"""Follow what blocks hand on: ``hidden``, whose residual is cached, and text streams beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from .refusal import refuse
from .words import Call, Cut, arguments, results, shape_of

__all__ = ["Streams", "find_streams"]


@dataclass
class Streams:
    """What goes from block to block.

    Attributes:
        blocks: The blocks' calls, in order.
        of: Value → its stream.
        inputs: Template → position of an argument → stream.
        outputs: Template → position of a result → stream.
    """

    blocks: Sequence[Call]
    of: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, dict[int, str]] = field(default_factory=dict)
    outputs: dict[str, dict[int, str]] = field(default_factory=dict)

    @property
    def first_of_hidden(self) -> str:
        """The template of the first block that ``hidden`` goes through."""
        return next(c.segment for c in self.blocks if "hidden" in self.inputs[c.segment].values())


def find_streams(cut: Cut) -> Streams:
    """Follow what blocks hand on: ``hidden`` comes from `head`, others from the prompt.

    Raises:
        ExportError: a block reads or begins what no stream of a bundle can be.
    """
    return _Streams(cut).found()


class _Streams:
    def __init__(self, cut: Cut) -> None:
        self.cut = cut
        self.blocks = [c for c in cut.calls if c.block and cut.segments[c.segment].runs == "block"]
        self.maker = {name: call for call in cut.calls for name in call.outputs}

    def _runs(self, call: Call) -> str:
        return self.cut.segments[call.segment].runs

    def found(self) -> Streams:
        """Name each stream where it begins, and follow it."""
        found = Streams(self.blocks)
        carried = self._carried()
        made = {v for c in self.cut.calls if self._runs(c) == "step" for v in c.outputs}
        begun = list(dict.fromkeys(v for call in self.blocks for v in call.inputs if v in made))
        if len(begun) != 1:
            refuse(self.cut.model, f"hands {len(begun)} values of the latents to its blocks", begun)
        found.of[begun[0]] = "hidden"
        texts = 0
        for position, call in enumerate(self.blocks):
            handed = (*begun, *(self.blocks[position - 1].outputs if position else ()))
            passed = carried[call.segment]
            inputs = found.inputs.setdefault(call.segment, {})
            for i, value in enumerate(call.inputs):
                if value not in found.of and i in passed.values():
                    texts += 1
                    found.of[value] = "text" if texts == 1 else f"text_{texts}"
                if value in found.of and value not in handed and self._is_of_block(value):
                    refuse(
                        self.cut.model,
                        "reads in one block what a block before the last made",
                        [value],
                    )
                if value in found.of and (i in passed.values() or value in handed):
                    known = inputs.setdefault(i, found.of[value])
                    if known != found.of[value]:
                        refuse(self.cut.model, "hands different streams to equal blocks", [value])
            outputs = found.outputs.setdefault(call.segment, {})
            for j, value in enumerate(call.outputs):
                if passed.get(j) not in inputs:
                    refuse(self.cut.model, "has a block that begins a stream", [value])
                outputs[j] = found.of[value] = inputs[passed[j]]
        return found

    def _is_of_block(self, value: str) -> bool:
        """Say whether a block makes a value."""
        return value in self.maker and bool(self.maker[value].block)

    def _carried(self) -> dict[str, dict[int, int]]:
        """Return template → position of a result → argument of the next equal block that takes it.

        A block that no equal one follows takes as it gives: arguments and results of one shape.
        """
        carried: dict[str, dict[int, int]] = {c.segment: {} for c in self.blocks}
        for one, two in pairwise(self.blocks):
            if one.segment == two.segment:
                for i, value in enumerate(two.inputs):
                    if value in one.outputs:
                        carried[one.segment][one.outputs.index(value)] = i
        for call in self.blocks:
            passed = carried[call.segment]
            for j in range(len(call.outputs)):
                found = passed[j] if j in passed else self._alike(call, j)
                if found is not None:
                    passed[j] = found
        return carried

    def _alike(self, call: Call, output: int) -> int | None:
        """Return the stream's argument whose shape a result has."""
        segment = self.cut.segments[call.segment]
        wanted = shape_of(results(segment.module)[output])
        for i, node in enumerate(arguments(segment.module)):
            made = self.maker.get(call.inputs[i])
            is_stream = made is not None and self._runs(made) in ("block", "step", "prompt")
            if is_stream and shape_of(node) == wanted:
                return i
        return None
