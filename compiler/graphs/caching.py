# SPDX-License-Identifier: Apache-2.0
"""The graphs of caching itself, the same for every model and every policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx, nn

from ...bundle.sections import beside_cached
from ...bundle.streams import HIDDEN, HISTORY, RESIDUAL, kept_name
from ...engines.base import TensorSpec
from ..cut.declared import FIRST_BLOCK_RESIDUAL, Cut, Segment

__all__ = ["cache_segments", "caching_of"]


class Delta(nn.Module):
    """Hidden states after and before ``body`` → residual."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, hidden_out: Tensor, hidden: Tensor) -> Tensor:
        """Return ``residual``, in the dtype in which history is kept."""
        return (hidden_out - hidden).to(self.dtype)


class Reuse(nn.Module):
    """Hidden states and past residuals → hidden states as if ``body`` had run.

    ``mix`` follows the slots of the ring, not their age; the runtime permutes K scalars rather
    than K hidden-sized tensors.
    """

    def forward(self, hidden: Tensor, history: Tensor, mix: Tensor) -> Tensor:
        """Return ``hidden + Σ mix[k] · history[k]``, added in float32, in the dtype of ``hidden``."""
        flat = history.to(torch.float32).flatten(1)
        mixed = hidden + torch.matmul(mix.unsqueeze(0), flat).reshape(hidden.shape)
        return mixed.to(hidden.dtype)


class Gram(nn.Module):
    """Past residuals → the inner products of those linear combinations that ``factors`` names.

    Combinations are made before they are multiplied: products of neighbouring residuals differ in
    digits that float32 sums don't have.
    """

    def forward(self, history: Tensor, factors: Tensor) -> Tensor:
        """Return the mean products of elements, float32 [slots, slots]."""
        rows = torch.matmul(factors, history.to(torch.float32).flatten(1))
        return torch.matmul(rows, rows.transpose(0, 1)) / rows.shape[1]


def caching_of(cut: Cut, *, last_blocks: bool = True) -> tuple[Segment, ...]:
    """Return the graphs of caching that a cut needs.

    Args:
        cut: The cut model.
        last_blocks: Whether some policy may let last blocks run on reused steps: they read streams
            whose residuals nothing else needs, each with a ``delta`` and a ``reuse`` of its own.
    """
    found = cache_segments(cut.cached, cut.history_dtype)
    if not last_blocks:
        return found
    graphs = {segment.name: segment for segment in cut.segments}
    for stream, io in beside_cached(cut.stages, graphs, list(cut.cached)).items():
        spec = TensorSpec(io.dtype, tuple(io.shape))
        delta, reuse, *_ = cache_segments({stream: spec}, cut.history_dtype)
        found += tuple(replace(one, name=f"{one.name}.{stream}") for one in (delta, reuse))
    return found


def cache_segments(streams: Mapping[str, TensorSpec], history_dtype: str) -> tuple[Segment, ...]:
    """Return ``delta``, ``reuse``, ``gram`` and the probe's signal.

    ``delta`` and ``reuse`` serve all streams, by one mix; ``gram`` and the signal, which decide, look
    at ``hidden``.

    Args:
        streams: `Cut.cached`: stream → its spec, the one that decides first.
        history_dtype: dtype in which residuals are kept.
    """
    first, hidden = next(iter(streams.items()))
    mix = TensorSpec("float32", ("slots",))
    deltas, reuses = dict[str, Sequence[str]](), dict[str, Sequence[str]]()
    before, residuals, past, after = (dict[str, TensorSpec]() for _ in range(4))
    for stream, spec in streams.items():
        kept = kept_name(stream, HISTORY)
        deltas[stream] = (f"{stream}_out", stream)
        reuses[stream] = (stream, kept, "mix")
        before |= {f"{stream}_out": spec, stream: spec}
        residuals[kept_name(stream, RESIDUAL)] = TensorSpec(history_dtype, spec.shape)
        past |= {stream: spec, kept: TensorSpec(history_dtype, ("slots", *spec.shape))}
        after[f"{stream}_out"] = spec
    history = past[kept_name(first, HISTORY)]
    return (
        Segment(
            "delta",
            "computed",
            _for_each(Delta(getattr(torch, history_dtype)), deltas),
            before,
            residuals,
        ),
        Segment("reuse", "reused", _for_each(Reuse(), reuses), {**past, "mix": mix}, after),
        Segment(
            "gram",
            "computed",
            Gram(),
            {"history": history, "factors": TensorSpec("float32", ("slots", "slots"))},
            {"gram": TensorSpec("float32", ("slots", "slots"))},
        ),
        Segment(
            FIRST_BLOCK_RESIDUAL,
            "probe",
            Delta(torch.float32),
            {"hidden_out": hidden, "hidden": hidden},
            {FIRST_BLOCK_RESIDUAL: hidden},
        ),
    )


def _for_each(part: nn.Module, streams: Mapping[str, Sequence[str]]) -> nn.Module:
    """Return one module that does for every stream what a part does for one.

    Args:
        part: What is done.
        streams: Stream → the arguments that the part is given, by the names of the whole's.
    """
    if list(streams) == [HIDDEN]:
        return part
    graph = fx.Graph()
    names = dict.fromkeys(name for arguments in streams.values() for name in arguments)
    given = {name: graph.placeholder(name) for name in names}
    calls = [
        graph.call_module("part", tuple(given[n] for n in arguments))
        for arguments in streams.values()
    ]
    graph.output(tuple(calls))
    return fx.GraphModule({"part": part}, graph)
