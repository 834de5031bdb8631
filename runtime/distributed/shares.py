# SPDX-License-Identifier: Apache-2.0
"""Which tokens, heads and channels are each rank's, and what a manifest says to one of them.

Rank r of P has the r-th of P nearly equal parts of every stream, the first ranks one token more where P
does not divide. A sequence of several streams is, on each rank, its part of each in their order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from torch import Tensor

from ...bundle.dims import derive_dims
from ...bundle.manifest import GraphEntry, IoEntry, Manifest, SequenceEntry
from ...bundle.streams import HIDDEN, HISTORY, RESIDUAL, kept_name
from ...core.errors import RequestError

__all__ = ["FEATURE", "LOCAL", "Share", "local_manifest", "share", "side_by_side", "whole_dims"]

LOCAL = "local_"
"""How the names of dimensions begin of which each rank has a part."""

FEATURE = "attention_output"


def share(count: int, rank: int, size: int) -> tuple[int, int]:
    """Return first and end of a rank's part of ``count`` things."""
    each, more = divmod(count, size)
    first = rank * each + min(rank, more)
    return first, first + each + (rank < more)


@dataclass(frozen=True)
class Share:
    """One rank's part of a sequence.

    Attributes:
        rank: Which.
        size: Ranks.
        entry: How the bundle's model is shared out.
    """

    rank: int
    size: int
    entry: SequenceEntry

    def counts(self, dim: str, dims: Mapping[str, int]) -> list[int]:
        """Return how many tokens of a dimension, or of a sum of such, each rank has.

        Args:
            dim: Its name as the whole model has it.
            dims: All sizes of the whole model.
        """
        terms = self.entry.sums.get(dim, [dim])
        parts = [[share(dims[t], rank, self.size) for t in terms] for rank in range(self.size)]
        return [sum(end - first for first, end in part) for part in parts]

    def local_dims(self, dims: Mapping[str, int]) -> dict[str, int]:
        """Return the sizes of this rank's parts, of those dimensions that are known.

        Raises:
            RequestError: a rank would have no token.
        """
        plain = dict.fromkeys(d for parts in self.entry.shared.values() for d in parts)
        found = {}
        for dim in [*plain, *self.entry.sums]:
            if all(term in dims for term in self.entry.sums.get(dim, [dim])):
                counts = self.counts(dim, dims)
                if min(counts) < 1:
                    raise RequestError(
                        f"dimension '{dim}'",
                        f"is {dims[dim]}, fewer than {self.size} ranks",
                        "start fewer ranks",
                    )
                found[f"{LOCAL}{dim}"] = counts[self.rank]
        return found

    def parts(
        self, streams: Sequence[str], dims: Mapping[str, int]
    ) -> list[tuple[tuple[int, int], tuple[int, int]]]:
        """Return where this rank's tokens are in a value, and in its part of it.

        Args:
            streams: The dimensions whose tokens lie one behind the other in the value.
            dims: All sizes of the whole model.
        """
        found, at, start = [], 0, 0
        for dim in streams:
            first, end = share(dims[dim], self.rank, self.size)
            found.append(((at + first, at + end), (start, start + end - first)))
            at, start = at + dims[dim], start + end - first
        return found

    def places(self, count: int) -> list[tuple[int, int]]:
        """Return first and end of each rank's part of heads or channels."""
        return [share(count, rank, self.size) for rank in range(self.size)]


def side_by_side(counts: Sequence[int]) -> list[tuple[int, int]]:
    """Return first and end of each of some parts that lie one behind the other."""
    ends = list(accumulate(counts))
    return list(zip([0, *ends], ends, strict=False))


def local_manifest(whole: Manifest, own: Share) -> Manifest:
    """Return a manifest as one rank sees it: what it has a part of has other dimensions.

    Graphs that make such a value, or take one, are declared with the part: those that run in several
    steps are carried out so that this is true (`sequence.SharedModel`).
    """
    entry = own.entry
    skips = {n: s.stream for stage in whole.stages for n, s in stage.skips.items()}
    graphs = {}
    for name, graph in whole.graphs.items():
        if graph.runs in ("part", "attention", "decide"):
            graphs[name] = graph
            continue
        ios = [
            {n: _local(n, io, graph, entry, skips, own) for n, io in side.items()}
            for side in (graph.inputs, graph.outputs)
        ]
        graphs[name] = graph.model_copy(update={"inputs": ios[0], "outputs": ios[1]})
    return whole.model_copy(update={"graphs": graphs})


def _local(
    name: str,
    io: IoEntry,
    graph: GraphEntry,
    entry: SequenceEntry,
    skips: Mapping[str, str],
    own: Share,
) -> IoEntry:
    value = skips.get(name, name.removesuffix("_out"))
    if name == FEATURE:
        batch, tokens, channels = io.shape
        assert isinstance(channels, int), "channels are a number"
        first, end = share(channels, own.rank, own.size)
        return io.model_copy(update={"shape": [batch, tokens, end - first]})
    streams = {HIDDEN, *entry.shared}
    is_kept = name in {kept_name(s, kept) for s in streams for kept in (HISTORY, RESIDUAL)}
    reads_tokens = any(n in entry.shared for n in graph.inputs)
    is_signal = graph.runs in ("signal", "probe") and name in graph.outputs and reads_tokens
    if value not in entry.shared and not is_kept and not is_signal:
        return io
    dims = dict.fromkeys(d for parts in entry.shared.values() for d in parts)
    shared = {*dims, *entry.sums}
    shape = [f"{LOCAL}{d}" if d in shared else d for d in io.shape]
    return io.model_copy(update={"shape": shape})


def whole_dims(manifest: Manifest, values: Mapping[str, Tensor]) -> dict[str, int]:
    """Return all sizes of the whole model that values given by callers tell."""
    sizes: dict[str, int] = {}
    for name, entry in manifest.inputs.items():
        if name in values and entry.runs != "run":
            pairs = zip(entry.shape, values[name].shape, strict=True)
            sizes |= {dim: size for dim, size in pairs if isinstance(dim, str)}
    return derive_dims(manifest, sizes)
