# SPDX-License-Identifier: Apache-2.0
"""Follow what blocks hand on: ``hidden``, whose residual is cached, and other streams beside it.

A model that samples several things at once has a cached stream for each that passes its blocks by
itself: ``hidden`` and ``audio_hidden`` (`bundle.streams`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from torch import fx

from ...bundle.streams import HIDDEN, LATENTS, beside
from .names import fresh_name
from .refusal import refuse
from .words import Call, Cut, arguments, results, shape_of

__all__ = ["Streams", "find_streams", "latents_of"]


@dataclass
class Streams:
    """What goes from block to block.

    Attributes:
        blocks: The blocks' calls, in order, with what runs before the first or between two.
        of: Value → its stream.
        inputs: Template → position of an argument → stream.
        outputs: Template → position of a result → stream.
        skips: Template → position of an argument → stream that it reads as a block of an earlier
            stage left it.
    """

    blocks: Sequence[Call]
    of: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, dict[int, str]] = field(default_factory=dict)
    outputs: dict[str, dict[int, str]] = field(default_factory=dict)
    skips: dict[str, dict[int, str]] = field(default_factory=dict)

    @property
    def first_of_hidden(self) -> str:
        """The template of the first block that ``hidden`` goes through."""
        return next(c.segment for c in self.blocks if "hidden" in self.outputs[c.segment].values())

    def skip_names(self, template: str) -> dict[int, str]:
        """Return position of an argument that is a skip connection → its name."""
        names: dict[int, str] = {}
        for i, stream in self.skips.get(template, {}).items():
            names[i] = fresh_name(f"{stream}_skip", names.values())
        return names

    def place_of(self, value: str) -> int:
        """Return the place in the loop of the call that makes a value."""
        return next(i for i, call in enumerate(self.blocks) if value in call.outputs)


def latents_of(cut: Cut) -> dict[str, str]:
    """Return each input that changes at every step → what a bundle calls it: the first ``latents``."""
    found: dict[str, str] = {}
    for name, one in cut.inputs.items():
        if one.changes == "step":
            kind = name.split(".")[0].removesuffix("_states").removesuffix(HIDDEN)
            kind = kind.removesuffix(LATENTS).rstrip("_")
            found[name] = fresh_name(f"{kind}_{LATENTS}".lstrip("_"), found.values())
            if len(found) == 1:
                found[name] = LATENTS
    return found


def find_streams(cut: Cut) -> Streams:
    """Follow what blocks hand on: cached streams come from `head`, others from the prompt or a block.

    Raises:
        ExportError: a block, or what is behind the last, reads what no stream of a bundle can be.
    """
    return _Streams(cut).found()


class _Streams:
    def __init__(self, cut: Cut) -> None:
        self.cut = cut
        self.blocks = [c for c in cut.calls if cut.segments[c.segment].runs == "block"]
        self.maker = {name: call for call in cut.calls for name in call.outputs}

    def _runs(self, call: Call) -> str:
        return self.cut.segments[call.segment].runs

    def found(self) -> Streams:
        """Name each stream where it begins, and follow it."""
        found = Streams(self.blocks)
        carried = self._carried()
        now = self._begun()
        found.of |= {value: stream for stream, value in now.items()}
        cached = set(now)
        for place, call in enumerate(self.blocks):
            passed = carried[call.segment]
            if call.segment not in found.inputs:
                self._carry_rest(place, passed, now["hidden"])
            inputs = found.inputs.setdefault(call.segment, {})
            skips = found.skips.setdefault(call.segment, {})
            for i, value in enumerate(call.inputs):
                if value not in found.of and i in passed.values():
                    found.of[value] = fresh_name("text", now)
                    now[found.of[value]] = value
                stream = found.of.get(value)
                if stream is None:
                    continue
                is_now = now[stream] == value
                if not is_now and not self._is_of_body(value):
                    continue
                if not is_now and self.maker[value].segment == call.segment:
                    refuse(
                        self.cut.model,
                        "reads in one block what an equal block before the last made",
                        [value],
                    )
                read, other = (inputs, skips) if is_now else (skips, inputs)
                if read.setdefault(i, stream) != stream or i in other:
                    refuse(self.cut.model, "hands different streams to equal blocks", [value])
            outputs = found.outputs.setdefault(call.segment, {})
            for j, value in enumerate(call.outputs):
                begins = fresh_name(value.rpartition(".")[2], {*now, *outputs.values()})
                stream = inputs.get(passed.get(j, -1)) or outputs.get(j, begins)
                outputs[j] = found.of[value] = stream
                now[stream] = value
        behind = self.cut.calls[-1]
        of_body = {v: found.of[v] for v in behind.inputs if self._is_of_body(v)}
        more = [v for v, stream in of_body.items() if stream not in cached or now[stream] != v]
        if more:
            refuse(self.cut.model, "reads behind its blocks more than the latents' stream", more)
        left = [now[stream] for stream in cached - set(of_body.values())]
        if left:
            refuse(self.cut.model, "reads no more behind its blocks of a stream of latents", left)
        return found

    def _begun(self) -> dict[str, str]:
        """Return each cached stream, as `head` gives it: one for each of the latents at most."""
        made = {v for c in self.cut.calls if self._runs(c) == "step" for v in c.outputs}
        begun = list(dict.fromkeys(v for call in self.blocks for v in call.inputs if v in made))
        latents = latents_of(self.cut)
        named: dict[str, str] = {}
        for value in begun:
            read = [name for name in latents if name in self._reads(value)]
            if read:
                named.setdefault(beside(latents[read[0]], LATENTS, HIDDEN), value)
        if len(named) != len(begun) or HIDDEN not in named:
            refuse(self.cut.model, f"hands {len(begun)} values of the latents to its blocks", begun)
        return {HIDDEN: named[HIDDEN], **named}

    def _reads(self, value: str) -> set[str]:
        """Return the inputs that `head` makes a value of."""
        call = self.maker[value]
        module = self.cut.segments[call.segment].module
        given = dict(zip(arguments(module), call.inputs, strict=True))
        left: list[fx.Node] = [results(module)[call.outputs.index(value)]]
        seen = set(left)
        while left:
            new = [n for n in left.pop().all_input_nodes if n not in seen]
            seen.update(new)
            left += new
        return {given[node] for node in seen if node in given}

    def _is_of_body(self, value: str) -> bool:
        """Say whether a block makes a value, or what runs before or between blocks."""
        return value in self.maker and self._runs(self.maker[value]) == "block"

    def _carried(self) -> dict[str, dict[int, int]]:
        """Return template → position of a result → argument of the next equal block that takes it."""
        carried: dict[str, dict[int, int]] = {c.segment: {} for c in self.blocks}
        for one, two in pairwise(self.blocks):
            if one.segment == two.segment:
                for i, value in enumerate(two.inputs):
                    if value in one.outputs:
                        carried[one.segment][one.outputs.index(value)] = i
        return carried

    def _carry_rest(self, place: int, passed: dict[int, int], hidden: str) -> None:
        """Pair what no equal block tells: a result and the argument that it takes the place of.

        They have one shape, and no block reads the argument later. What the next block reads comes
        before what it does not, ``hidden`` before other arguments.
        """
        call, behind = self.blocks[place], self.blocks[place + 1 :]
        read_next = behind[0].inputs if behind else ()
        read_later = {value for later in behind for value in later.inputs}
        outputs = sorted(range(len(call.outputs)), key=lambda j: call.outputs[j] not in read_next)
        for j in (j for j in outputs if j not in passed):
            alike = [
                i
                for i in self._alike(call, j)
                if i not in passed.values() and call.inputs[i] not in read_later
            ]
            if alike:
                passed[j] = min(alike, key=lambda i: call.inputs[i] != hidden)

    def _alike(self, call: Call, output: int) -> list[int]:
        """Return the streams' arguments whose shape a result has."""
        segment = self.cut.segments[call.segment]
        wanted = shape_of(results(segment.module)[output])
        found = []
        for i, node in enumerate(arguments(segment.module)):
            made = self.maker.get(call.inputs[i])
            is_stream = made is not None and self._runs(made) in ("block", "step", "prompt")
            if not call.block and made is not None and self._runs(made) == "prompt":
                continue  # what is made of a prompt between blocks is another value
            if is_stream and shape_of(node) == wanted:
                found.append(i)
        return found
