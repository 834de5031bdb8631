# SPDX-License-Identifier: Apache-2.0
"""Divide the block loop: first blocks that always run, those that are cached, last ones that always run.

Blocks are counted by what they do to ``hidden``: what runs before or between them and passes other
streams alone on goes with the block behind it, but before the last ones with those that are cached.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from ..core.errors import ConfigError
from .manifest import StageEntry
from .streams import HIDDEN, OUT, passed_on

__all__ = ["Declared", "Sections", "beside_cached", "count_blocks", "divide"]


class _Io(Protocol):
    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> Sequence[int | str]: ...


class Declared(Protocol):
    """A graph's declaration: a manifest's entry, or a segment of a cut."""

    @property
    def inputs(self) -> Mapping[str, _Io]:
        """What it takes but weights."""

    @property
    def outputs(self) -> Mapping[str, _Io]:
        """What it gives."""


@dataclass(frozen=True)
class Sections:
    """Which calls of the block loop run when.

    Attributes:
        first_blocks: Blocks that run before the decision, at every step.
        last_blocks: Blocks that run behind the reused ones, at every step.
        blocks: All that pass ``hidden`` on.
        begin: Calls before the first that is cached.
        end: Calls before the first of the last ones.
        streams: What the cached calls change and something behind them reads, ``hidden`` first.
    """

    first_blocks: int
    last_blocks: int
    blocks: int
    begin: int
    end: int
    streams: tuple[str, ...]

    @property
    def always_run(self) -> float:
        """Part of the blocks that a reused step runs, 0 to below 1."""
        return (self.first_blocks + self.last_blocks) / self.blocks


def count_blocks(stages: Sequence[StageEntry], graphs: Mapping[str, Declared]) -> int:
    """Return the blocks that pass ``hidden`` on."""
    return sum(s.count for s in stages if f"{HIDDEN}{OUT}" in graphs[s.block].outputs)


def beside_cached(
    stages: Sequence[StageEntry], graphs: Mapping[str, Declared], cached: Sequence[str]
) -> dict[str, _Io]:
    """Return the streams whose residuals only last blocks need, and what blocks give of them.

    Args:
        stages: The block loop.
        graphs: Of the stages' blocks at least.
        cached: Streams whose residuals are always kept.
    """
    blocks = [graphs[stage.block] for stage in stages]
    return {
        stream: block.outputs[f"{stream}{OUT}"]
        for block in blocks
        for stream in passed_on(block.outputs)
        if stream not in cached and any(stream in reader.inputs for reader in blocks)
    }


def divide(
    stages: Sequence[StageEntry],
    graphs: Mapping[str, Declared],
    cached: Sequence[str],
    first_blocks: int,
    last_blocks: int,
) -> Sections:
    """Find where a body divides.

    Args:
        stages: The block loop, its blocks not grouped.
        graphs: Of the stages' blocks at least.
        cached: Streams that ``head`` begins and ``finish`` reads, ``hidden`` first.
        first_blocks: That run at every step, at least 1.
        last_blocks: That run at every step.

    Raises:
        ConfigError: no block is left between, or the last ones read what a reused step does not have.
    """
    names = [stage.block for stage in stages for _ in range(stage.count)]
    blocks = [graphs[name] for name in names]
    passing = [i for i, block in enumerate(blocks) if f"{HIDDEN}{OUT}" in block.outputs]
    where = f"{first_blocks} first and {last_blocks} last blocks that always run"
    if first_blocks + last_blocks >= len(passing):
        raise ConfigError(
            where,
            f"leave none of the model's {len(passing)} blocks to be cached",
            f"let at most {len(passing) - 1} of them run",
        )
    begin = passing[first_blocks - 1] + 1
    end = passing[-last_blocks] if last_blocks else len(blocks)
    found = Sections(first_blocks, last_blocks, len(passing), begin, end, tuple(cached))
    if not last_blocks:
        return found
    _check_skips(stages, found, where)
    wanted = [s for s in _read_behind(blocks, end) if s not in cached]
    middle = blocks[begin:end]
    changed = [s for s in wanted if any(f"{s}{OUT}" in block.outputs for block in middle)]
    for stream in changed:
        _check_stream(stream, blocks, found, where)
    return replace(found, streams=(*cached, *changed))


def _read_behind(blocks: Sequence[Declared], end: int) -> list[str]:
    """Return the streams that calls from ``end`` on read as those before left them."""
    streams = {stream for block in blocks for stream in passed_on(block.outputs)}
    found: dict[str, None] = {}
    written: set[str] = set()
    for block in blocks[end:]:
        found |= dict.fromkeys(n for n in block.inputs if n in streams - written)
        written |= {*passed_on(block.outputs)}
    return list(found)


def _check_skips(stages: Sequence[StageEntry], found: Sections, where: str) -> None:
    """Refuse last blocks to which a skip connection leads from one that is cached."""
    place = 0
    for stage in stages:
        for skip in stage.skips.values():
            for at, maker in enumerate(skip.blocks, place):
                if at >= found.end and found.begin <= maker < found.end:
                    raise ConfigError(
                        where,
                        f"don't fit: block {at} of the loop reads what block {maker} left, "
                        "which a reused step does not run",
                        "let fewer last blocks run, or as many first ones",
                    )
        place += stage.count


def _check_stream(stream: str, blocks: Sequence[Declared], found: Sections, where: str) -> None:
    """Refuse a stream that is another thing behind the cached blocks than before them."""
    writers = [i for i, block in enumerate(blocks) if f"{stream}{OUT}" in block.outputs]
    before = [i for i in writers if i < found.begin]
    last = blocks[max(i for i in writers if i < found.end)].outputs[f"{stream}{OUT}"]
    first = blocks[writers[0]]
    begun = blocks[before[-1]].outputs[f"{stream}{OUT}"] if before else first.inputs.get(stream)
    if begun is None or (begun.dtype, list(begun.shape)) != (last.dtype, list(last.shape)):
        raise ConfigError(
            where,
            f"don't fit: the last ones read stream '{stream}', which begins among the cached "
            "ones, or changes its shape there",
            "let fewer last blocks run",
        )
