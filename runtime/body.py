# SPDX-License-Identifier: Apache-2.0
"""The block loop of one branch, bound once: a computed step is one call per block or group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..bundle.dims import match_dims
from ..bundle.manifest import GraphEntry, GroupEntry, StageEntry
from ..bundle.sections import Sections
from ..bundle.streams import HIDDEN
from ..core.errors import RequestError
from ..engines.base import BoundCall
from .block_tables import BlockTables
from .buffers import allocate
from .finite import is_finite
from .model import Model

__all__ = ["Body"]

FEATURE = "attention_output"


@dataclass
class _Call:
    """One bound call of the body, and what it was bound to."""

    graph: str
    block: int
    values: Mapping[str, Tensor]
    bound: BoundCall


class Body:
    """Prompt context and bound calls of one branch: one per block, or per group of baked blocks.

    Cached streams (``hidden``) go from what ``head`` gave (kept, for the residual) through two
    alternating buffers that all branches share. Other streams go from what ``prompt`` gave through
    two buffers of the branch's own. What a later stage reads (a skip connection) has a buffer of its
    own in each branch.

    Attributes:
        context: The prompt's inputs and what its graph made of them.
        first: What the first block that passes ``hidden`` on reads for itself.
        dims: Every named dimension, those of the prompt included.
        results: Cached stream → [batch, tokens, channels], where the body's result appears.
        taps: Two buffers of the feature, written in turn; empty until `bind_taps`.
        sections: Where it divides; None until `divide`.
        before: Stream of the sections → what the first blocks gave of it, which stays until the next step.
        after: Likewise → what the cached blocks gave, or a reused step put in its place.
    """

    def __init__(
        self,
        model: Model,
        branch: str,
        shared: Mapping[str, Tensor],
        prompt: Mapping[str, Tensor],
        dims: Mapping[str, int],
        tables: BlockTables,
    ) -> None:
        """Allocate the branch's context, compute it from ``prompt``, bind every block.

        Args:
            model: Engines.
            branch: For messages.
            shared: Buffers that branches share.
            prompt: The prompt's inputs.
            dims: Sizes of the latents' dimensions.
            tables: Those that blocks make without the prompt.

        Raises:
            RequestError: the prompt's batch is not the latents'.
        """
        self._model, self._manifest = model, model.manifest
        self._prompt = {n: t.clone() for n, t in prompt.items()}
        dims = model.dims_of({**dims, **self._prompt_dims(branch, dims)})
        self.dims = dims
        by_prompt = {n: g for n, g in self._manifest.graphs.items() if g.runs == "prompt"}
        self.context = context = dict(self._prompt)
        for graph in by_prompt.values():
            context |= allocate(graph.outputs, dims, model.device)
        self._prompt_calls = [model.bind(n, {**shared, **context}) for n in by_prompt]
        self._tables = BlockTables(model, dims, by_prompt=True)
        self._rows = {**tables.rows, **self._tables.rows}
        self._is_modulated, self._row = False, -1
        self.first: dict[str, Tensor] = {}
        self._calls: list[_Call] = []
        self._tapped: list[BoundCall] = []
        self._chains: dict[tuple[int | None, int, int], BoundCall] = {}
        self.taps: list[Tensor] = []
        self.sections: Sections | None = None
        self.before: dict[str, Tensor] = {}
        self.after: dict[str, Tensor] = {}
        cached = self._manifest.cached
        self._streams = {s: shared[s] for s in cached}
        self._buffers = {s: [shared[f"{s}_even"], shared[f"{s}_odd"]] for s in cached}
        self._kept: dict[tuple[str, int], Tensor] = {}
        before = 0  # blocks of earlier stages
        for index, stage in enumerate(self._manifest.stages):
            blocks = range(stage.first, stage.first + stage.count)
            own = {b: self._own_of(stage, b, {**shared, **context}) for b in blocks}
            for block in blocks:
                own[block] |= self._rows.get((index, block), {})
            for name, skip in stage.skips.items():
                for block, maker in zip(blocks, skip.blocks, strict=True):
                    own[block][name] = self._kept[skip.stream, maker]
            if not self.first and HIDDEN in self._manifest.graphs[stage.block].streams:
                self.first = own[stage.first]
            place = before - stage.first
            for group in stage.groups:
                members = range(group.first, group.first + group.count)
                named = {f"{n}.{b}": t for b in members for n, t in own[b].items()}
                values = {**shared, **context, **named, **self._kept_of_group(group, place)}
                self._add_call(group.graph, members, values, group.graph)
            for block in () if stage.groups else blocks:
                values = {**shared, **context, **own[block]}
                one = range(block, block + 1)
                self._add_call(stage.block, one, values, stage.tapped, place + block)
            before += stage.count
        self.results = {s: self._streams[s] for s in cached}
        self._undivided = list(self._calls)
        self.set_prompt(prompt)

    def _own_of(
        self, stage: StageEntry, block: int, values: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return what ``block`` alone reads, and bind the call that makes its context."""
        own = {name: values[read[block - stage.first]] for name, read in stage.reads.items()}
        if stage.context is None:
            return own
        made = allocate(self._manifest.graphs[stage.context].outputs, self.dims, self._model.device)
        values = {**values, **own, **made}
        self._prompt_calls.append(self._model.bind(stage.context, values, block))
        return {**own, **made}

    def _kept_of_group(self, group: GroupEntry, place: int) -> dict[str, Tensor]:
        """Allocate what blocks of a group give that a later stage reads; ``place`` is block 0's."""
        outputs = self._manifest.graphs[group.graph].outputs
        members = range(group.first, group.first + group.count)
        kept = {
            (s, b): f"{s}_out.{b}"
            for s, p in self._manifest.kept
            for b in members
            if p == place + b
        }
        made = allocate({n: outputs[n] for n in kept.values()}, self.dims, self._model.device)
        self._kept |= {(stream, place + b): made[name] for (stream, b), name in kept.items()}
        return made

    def _add_call(
        self,
        graph: str,
        blocks: range,
        values: Mapping[str, Tensor],
        tapped: str | None,
        place: int | None = None,
    ) -> None:
        """Bind the next call of the body to the streams as the one before leaves them.

        At a ``place`` in the loop whose result a later stage reads, that is kept.
        """
        entry = self._manifest.graphs[graph]
        values = {**values, **self._streams}
        for stream in entry.streams:
            if place is not None and (stream, place) in self._manifest.kept:
                spec = {stream: entry.outputs[f"{stream}_out"]}
                target = allocate(spec, self.dims, self._model.device)[stream]
                self._kept[stream, place] = target
            else:
                target = self._next_buffer(stream, entry)
            values[f"{stream}_out"] = self._streams[stream] = target
        # A group writes its feature on every run, wanted or not.
        if FEATURE in entry.outputs:
            values |= self._feature_buffer(graph)
        bound = self._model.bind(graph, values, blocks[0])
        self._calls.append(_Call(graph, blocks[0], values, bound))
        if self._manifest.feature_block in blocks and tapped is not None:
            self._feature_call, self._tapped_graph = len(self._calls) - 1, tapped

    def _next_buffer(self, stream: str, entry: GraphEntry) -> Tensor:
        """Return the one of a stream's two buffers that does not hold it now."""
        if stream not in self._buffers:
            spec = {stream: entry.outputs[f"{stream}_out"]}
            pair = [allocate(spec, self.dims, self._model.device)[stream] for _ in range(2)]
            self._buffers[stream] = pair
        even, odd = self._buffers[stream]
        return odd if self._streams.get(stream) is even else even

    def _prompt_dims(self, branch: str, dims: Mapping[str, int]) -> dict[str, int]:
        found: dict[str, int] = {}
        for name, tensor in self._prompt.items():
            for dim, size in match_dims(name, self._manifest.inputs[name], tensor.shape).items():
                if dims.get(dim, size) != size:
                    raise RequestError(
                        f"branch '{branch}', input '{name}'",
                        f"has {dim} {size}, the latents have {dims[dim]}",
                        "give one prompt per batch element",
                    )
                found[dim] = size
        return found

    def fits(self, prompt: Mapping[str, Tensor]) -> bool:
        """Tell whether another prompt has the shapes that this body was bound for."""
        return all(self._prompt[n].shape == t.shape for n, t in prompt.items())

    def set_prompt(self, prompt: Mapping[str, Tensor]) -> None:
        """Compute the context of every block for this prompt."""
        for name, tensor in prompt.items():
            self._prompt[name].copy_(tensor)
        for call in self._prompt_calls:
            call.run()
        self.forget_tables()

    def forget_tables(self) -> None:
        """Note that blocks have to make their tables again: the run's, or the prompt, are others."""
        self._is_modulated = False

    def modulate(self, tables: Mapping[str, Tensor], steps: int) -> None:
        """Have blocks make their tables of the run's, unless these are known."""
        if not self._is_modulated:
            self._tables.compute(tables, steps, self.context)
            self._is_modulated, self._row = True, -1

    def select_row(self, step_index: int) -> None:
        """Put a step's rows of the blocks' tables where their calls read them."""
        if step_index != self._row:
            self._tables.select(step_index)
            self._row = step_index

    def bind_taps(self) -> None:
        """Allocate the feature buffers and bind the tapped block or group to each of them."""
        if self.taps:
            return
        values = self._calls[self._feature_call].values
        if FEATURE in values:
            self.taps.append(values[FEATURE])
        while len(self.taps) < 2:
            self.taps.append(self._feature_buffer(self._tapped_graph)[FEATURE])
        self._bind_tapped()

    def _bind_tapped(self) -> None:
        call, graph = self._calls[self._feature_call], self._tapped_graph
        self._tapped = [
            self._model.bind(graph, {**call.values, FEATURE: tap}, call.block) for tap in self.taps
        ]

    def divide(self, sections: Sections) -> None:
        """Let what the first and the cached blocks leave lie where no block behind them writes.

        All blocks together give the same. What was divided otherwise before is forgotten.
        """
        if sections == self.sections:
            return
        self._calls, self.sections = list(self._undivided), sections
        passed = [stream for c in self._calls for stream in self._manifest.graphs[c.graph].streams]
        left: dict[tuple[str, int], Tensor] = {}
        before, after = (
            {stream: self._left(stream, at, left) for stream in dict.fromkeys(passed)}
            for at in (sections.begin, sections.end)
        )
        self.before = {s: before[s] for s in sections.streams}
        self.after = {s: after[s] for s in sections.streams}
        if self.taps:
            self._bind_tapped()
        self._chains.clear()

    def _left(self, stream: str, at: int, left: dict[tuple[str, int], Tensor]) -> Tensor:
        """Return where a stream lies before a call, in a buffer that no call from there on writes.

        So the calls from there on may be run again, as a CUDA graph's capture does.

        Args:
            stream: Its name.
            at: The call's place.
            left: Stream and the call that writes it → such buffers known so far.
        """
        passed = (self._manifest.graphs[call.graph].streams for call in self._calls)
        writers = [i for i, streams in enumerate(passed) if stream in streams]
        before = [i for i in writers if i < at]
        if not before:  # as `head` or `prompt` gave it, if it does not begin later
            call = self._calls[writers[0]].values
            return call.get(stream, call[f"{stream}_out"])
        writer, following = before[-1], writers[len(before) :]
        written = self._calls[writer].values[f"{stream}_out"]
        if not following or any(written is kept for kept in self._kept.values()):
            return written
        if (stream, writer) not in left:
            left[stream, writer] = own = torch.zeros_like(written)
            self._rebind(writer, {f"{stream}_out": own})
            for index in range(writer + 1, following[0] + 1):
                self._rebind(index, {stream: own})
        return left[stream, writer]

    def _rebind(self, index: int, values: Mapping[str, Tensor]) -> None:
        call = self._calls[index]
        values = {**call.values, **values}
        bound = self._model.bind(call.graph, values, call.block)
        self._calls[index] = _Call(call.graph, call.block, values, bound)

    def _feature_buffer(self, graph: str) -> dict[str, Tensor]:
        spec = {FEATURE: self._manifest.graphs[graph].outputs[FEATURE]}
        return allocate(spec, self.dims, self._model.device)

    def first_not_finite(self) -> str | None:
        """Run the blocks once more; name the first graph and block whose result is not finite."""
        for call in self._calls:
            call.bound.run()
            self._model.backend.synchronize()
            if not all(is_finite(t) for n, t in call.values.items() if n.endswith("_out")):
                return f"graph '{call.graph}', block {call.block}"
        return None

    def run(self, tap: int | None = None) -> None:
        """Run every block; ``tap`` names the buffer that gets the feature, if one is wanted."""
        self._run(tap, 0, len(self._calls))

    def run_first(self, tap: int | None = None) -> None:
        """Run the first blocks, those before the decision; `divide` was called."""
        self._run(tap, 0, self._divided.begin)

    def run_cached(self, tap: int | None = None) -> None:
        """Run the blocks whose result is cached."""
        self._run(tap, self._divided.begin, self._divided.end)

    def run_last(self, tap: int | None = None) -> None:
        """Run the blocks behind those."""
        if self._divided.end < len(self._calls):
            self._run(tap, self._divided.end, len(self._calls))

    @property
    def _divided(self) -> Sections:
        assert self.sections is not None, "divide() was called"
        return self.sections

    def _run(self, tap: int | None, first: int, end: int) -> None:
        key = (tap, first, end)
        if key not in self._chains:
            calls = [call.bound for call in self._calls]
            if tap is not None:
                calls[self._feature_call] = self._tapped[tap]
            self._chains[key] = self._model.chain(calls[first:end])
        self._chains[key].run()
