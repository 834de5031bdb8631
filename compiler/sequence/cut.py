# SPDX-License-Identifier: Apache-2.0
"""Cut a model once more, for ranks that share its sequence: every block, and what is behind the last."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

from ...bundle.manifest import PartEntry, SequenceEntry, SignalEntry, SumTerm
from ...bundle.streams import HIDDEN
from ...core.errors import ExportError
from ...policies.spec import PolicySpec
from ..cut.declared import FIRST_BLOCK_RESIDUAL, Cut, Segment
from .blocks import CutAttention, CutBlock, attention_segment, cut_block
from .finish import cut_finish
from .local import HINT, LOCAL, Tokens, check_tokens_apart, part_of_rank

__all__ = ["SequenceCut", "cut_sequence"]

EXAMPLES = (17, 19, 23, 29, 31, 37)
"""Sizes to trace with, none of which another dimension is traced with."""


@dataclass(frozen=True)
class SequenceCut:
    """A cut for ranks that share a sequence.

    Attributes:
        segments: Graphs beside those of the cut.
        entry: What the manifest says of them; its policies are for the caller to add.
        example_dims: Sizes to trace with, beside the cut's.
        tokens: Dimensions that are shared out.
        signals: Values that policies look at, of which each rank has a part.
    """

    segments: tuple[Segment, ...]
    entry: SequenceEntry
    example_dims: Mapping[str, int]
    tokens: Tokens
    signals: frozenset[str] = frozenset()

    def is_of_tokens(self, spec: PolicySpec, signals: Mapping[str, SignalEntry]) -> bool:
        """Tell whether a policy may look at a value of which each rank has a part."""
        looked_at = {signals[kind].value for kind in spec.signals if kind in signals}
        return spec.feature == "attention_output" or not looked_at.isdisjoint(self.signals)


def cut_sequence(cut: Cut) -> SequenceCut:
    """Cut a model for ranks that share its sequence.

    Raises:
        ExportError: something in it can't be shared out; says which graph, and what.
    """
    return _Cutter(cut).cut()


@dataclass
class _Cutter:
    cut_: Cut
    segments: list[Segment] = field(default_factory=list)
    attentions: dict[Any, str] = field(default_factory=dict)
    shared: dict[str, list[str]] = field(default_factory=dict)
    blocks: dict[str, list[PartEntry]] = field(default_factory=dict)
    signals: list[str] = field(default_factory=list)
    whole: dict[str, list[str]] = field(default_factory=dict)

    def cut(self) -> SequenceCut:
        """Cut every graph of tokens."""
        cut = self.cut_
        if len(cut.cached) > 1:
            names = ", ".join(cut.cached)
            raise ExportError("the model", f"samples several things at once: {names}", HINT)
        self.streams = self._streams()
        plain = dict.fromkeys([*self.streams.values()])
        self.tokens = Tokens(list(plain), _sums(plain, cut.sums))
        for name in self.streams:
            if not name.endswith("_skip"):
                self._share(name, [self.streams[name]], name)
        by_module: dict[int, CutBlock] = {}
        for segment in cut.segments:
            if segment.runs == "block":
                self._cut_block(segment, by_module)
            elif segment.runs == "signal":
                self._check_signal(segment)
        finish, shared = cut_finish(cut, self.tokens)
        self.segments += finish
        for name, dims in shared.items():
            self._share(name.removesuffix("_out"), dims, "finish")
        self._check_whole()
        joined = next((s.name for s in finish if s.name != finish[0].name), None)
        entry = SequenceEntry(
            sums=dict(self.tokens.sums),
            shared=self.shared,
            blocks=self.blocks,
            rows=finish[0].name,
            joined=joined,
            policies={},
        )
        examples = {f"{LOCAL}{d}": EXAMPLES[i] for i, d in enumerate(plain)}
        examples |= {n: sum(examples[t] for t in ts) for n, ts in self.tokens.local_sums.items()}
        examples |= {"attention_rows": 8, "attention_queries": 41, "attention_keys": 43}
        signals = frozenset({*self.signals, FIRST_BLOCK_RESIDUAL})
        return SequenceCut(tuple(self.segments), entry, examples, self.tokens, signals)

    def _streams(self) -> dict[str, str]:
        """Return what blocks hand on of tokens → the dimension of them."""
        found: dict[str, str] = {}
        blocks = [s for s in self.cut_.segments if s.runs == "block"]
        for segment in blocks:
            for name, spec in segment.outputs.items():
                is_of_tokens = len(spec.shape) == 3 and isinstance(spec.shape[1], str)
                if name.endswith("_out") and is_of_tokens:
                    found.setdefault(name.removesuffix("_out"), str(spec.shape[1]))
        for stage in self.cut_.stages:
            found |= {n: found[s.stream] for n, s in stage.skips.items() if s.stream in found}
        return {HIDDEN: found.pop(HIDDEN), **found}

    def _share(self, value: str, dims: list[str], graph: str) -> None:
        known = self.shared.setdefault(value, dims)
        if known != dims:
            raise ExportError(
                f"graph '{graph}', '{value}'",
                f"has the tokens of {known} elsewhere, here of {dims}",
                HINT,
            )

    def _cut_block(self, segment: Segment, by_module: dict[int, CutBlock]) -> None:
        streams = {n: d for n, d in self.streams.items() if n in segment.inputs}
        found = by_module.get(id(segment.module))
        if found is None:
            found = by_module[id(segment.module)] = cut_block(segment, streams, self.tokens)
            self._share_all(segment, found.shared)
            if found.attentions:
                self.segments += found.parts
            names = [part.name for part in found.parts]
        else:  # the same block with its feature tapped, or without
            names = [self._variant(segment, part) for part in found.parts if found.attentions]
        if not found.attentions:
            return
        entries = [PartEntry(graph=names[0])]
        for attention, name in zip(found.attentions, names[1:], strict=True):
            entries += [
                PartEntry(graph=self._attention(attention), mask=attention.mask),
                PartEntry(graph=name),
            ]
        self.blocks[segment.name] = entries

    def _variant(self, segment: Segment, part: Segment) -> str:
        """Return the name of a part that differs at most in the results that are dropped."""
        dropped = tuple(n for n in segment.dropped if n in part.outputs)
        if dropped == part.dropped:
            return part.name
        name = f"{segment.name}.{part.name.rpartition('.')[2]}"
        self.segments.append(replace(part, name=name, dropped=dropped))
        return name

    def _attention(self, attention: CutAttention) -> str:
        """Return the name of the graph of an attention; equal ones have one."""
        mask = attention.mask_spec
        rows = None if mask is None else (mask.dtype, mask.shape[0], mask.shape[2] == 1)
        key = (attention.scale, attention.query.dtype, attention.query.shape[-1], rows)
        if key not in self.attentions:
            count = len(self.attentions)
            name = f"attention_{count + 1}" if count else "attention"
            self.attentions[key] = name
            self.segments.append(attention_segment(name, attention))
        return self.attentions[key]

    def _share_all(self, segment: Segment, shared: Mapping[str, Any]) -> None:
        """Note of which values a rank has a part; each block may read another one there."""
        for name, dims in shared.items():
            if not name.endswith("_skip"):
                for value in self._values(segment, name):
                    self._share(value, list(dims), segment.name)
        whole = [n for n in segment.inputs if n not in shared]
        self.whole[segment.name] = [v for n in whole for v in self._values(segment, n)]

    def _values(self, segment: Segment, name: str) -> list[str]:
        """Return an input, and what each block reads there."""
        own = [s for s in self.cut_.stages if segment.name in (s.block, s.tapped)]
        return list(dict.fromkeys([name, *(v for s in own for v in s.reads.get(name, ()))]))

    def _check_signal(self, segment: Segment) -> None:
        module: Any = segment.module
        streams = [n for n in self.streams if n in segment.inputs]
        if not streams:
            return
        taken, found = part_of_rank(
            segment.name, module, segment.inputs, streams, self.tokens, lambda found: True
        )
        results = next(n for n in module.graph.nodes if n.op == "output").args[0]
        outputs = {n: found.spec(r) for n, r in zip(segment.outputs, results, strict=True)}
        check_tokens_apart(
            segment.name, module, taken, outputs, self.tokens, list(self.tokens.plain)
        )
        self.signals += outputs
        self._share_all(
            segment,
            {
                n: [str(segment.inputs[n].shape[1])]
                for n, s in taken.items()
                if s != segment.inputs[n]
            },
        )

    def _check_whole(self) -> None:
        """Raise where a graph needs all of what a rank has a part of."""
        for segment in self.cut_.segments:
            odd = [n for n in segment.inputs if n in self.shared]
            if segment.runs in ("prompt_block", "shape", "prompt", "run") and odd:
                raise ExportError(
                    f"graph '{segment.name}'", f"needs all tokens of '{odd[0]}'", HINT
                )
        for graph, values in self.whole.items():
            odd = [value for value in values if value in self.shared]
            if odd:
                raise ExportError(f"graph '{graph}'", f"needs all tokens of '{odd[0]}'", HINT)


def _sums(plain: Collection[str], sums: Mapping[str, Sequence[SumTerm]]) -> dict[str, list[str]]:
    """Return the dimension of every sequence of several streams' tokens, named or not."""
    found = {n: [str(t) for t in ts] for n, ts in sums.items() if all(t in plain for t in ts)}
    for count in range(2, len(plain) + 1):
        for terms in combinations(plain, count):
            if sorted(terms) not in map(sorted, found.values()):
                found["_plus_".join(terms)] = list(terms)
    return found
