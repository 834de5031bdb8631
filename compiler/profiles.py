# SPDX-License-Identifier: Apache-2.0
"""From the sizes that a build is asked for to the optimization profiles of every graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from math import prod
from pathlib import Path
from typing import Any

from ..bundle.dims import summed
from ..bundle.manifest import GraphEntry, PolicyEntry, ResolvedConfig, SequenceEntry
from ..core.errors import ConfigError, RequestError
from .cut.declared import Cut
from .graphs.filters import signal_spec, signals_of
from .sequence.local import LOCAL
from .sizes import Size, dims_of, size_of

__all__ = ["BuildSizes", "Profile", "Range", "dim_ranges", "parse_range", "profiles_of"]

Range = tuple[int, int, int]
"""Smallest, usual and largest value of a size."""

Profile = dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
"""Input name → its smallest, usual and largest shape."""

USUAL_RANKS = 4
"""Ranks for whose parts engines are tuned; they serve any number."""

MOST_STEPS = 1000
"""Timesteps that diffusers' schedulers are trained with; none takes more steps."""


@dataclass(frozen=True)
class BuildSizes:
    """What engines of fixed ranges are to serve; None takes what the carried configs ask for.

    Attributes:
        height: Pixels.
        width: Pixels.
        frames: Frames of the video.
        batch: Videos at once, in one branch.
    """

    height: Range | None = None
    width: Range | None = None
    frames: Range | None = None
    batch: Range | None = None


def parse_range(flag: str, text: str) -> Range:
    """Read a size, ``480``, or a range of them, ``min:opt:max``.

    Raises:
        ConfigError: it is neither, or not in rising order.
    """
    parts = text.split(":")
    if not all(p.strip().isdecimal() for p in parts) or len(parts) not in (1, 3):
        raise ConfigError(
            f"{flag} {text}", "is neither a size nor min:opt:max", f"write {flag} 256:480:720"
        )
    smallest, usual, largest = (int(p) for p in (parts * 3)[:3])
    if not 0 < smallest <= usual <= largest:
        raise ConfigError(f"{flag} {text}", "does not rise from 1 or more", "give min:opt:max")
    return smallest, usual, largest


def dim_ranges(
    cut: Cut, sizes: BuildSizes, configs: Mapping[str, ResolvedConfig], pipeline: Path | None
) -> dict[str, Range]:
    """Return the range of every named dimension of the model's graphs.

    A size that is not asked for ranges over what the carried configs ask for, and the first
    config's is the usual one. Prompts may be short, runs may have any number of steps.

    Args:
        cut: The model, cut.
        sizes: What is asked for.
        configs: Configs that the bundle carries.
        pipeline: Folder of the diffusers pipeline, for the VAE's scale.

    Raises:
        RequestError: a size that VAE or patches do not divide, or that the model has no positions
            for.
    """
    carried = [size_of(config.generation) for config in configs.values()]
    wanted = {f.name: getattr(sizes, f.name) or _spread(carried, f.name) for f in fields(sizes)}
    text, steps = _spread(carried, "text_tokens"), _spread(carried, "steps")
    corners = []
    for corner in range(3):
        pixels = {n: wanted[n][corner] for n in ("height", "width", "frames")}
        size = replace(carried[0], **pixels, text_tokens=text[corner], steps=steps[corner])
        corners.append({**dims_of(cut, size, pipeline), "batch": wanted["batch"][corner]})
    ranges = {dim: (corners[0][dim], corners[1][dim], corners[2][dim]) for dim in corners[0]}
    for dim, limit in cut.limits.items():
        if dim in ranges and ranges[dim][2] > limit.most:
            raise RequestError(
                f"largest '{dim}' of the build",
                f"is {ranges[dim][2]}, the model has positions for {limit.most}, {limit.where}",
                "ask for a smaller --height, --width or --frames",
            )
    ranges["text_tokens"] = (1, text[1], text[2])
    # Blocks' tables have a row for each step and element of the batch.
    ranges["steps"] = (1, steps[1], max(MOST_STEPS, steps[2]) * wanted["batch"][2])
    corners = [summed(cut.sums, {d: r[corner] for d, r in ranges.items()}) for corner in range(3)]
    return ranges | {dim: (corners[0][dim], corners[1][dim], corners[2][dim]) for dim in corners[0]}


def profiles_of(
    graphs: Mapping[str, GraphEntry],
    policies: Mapping[str, PolicyEntry],
    cut: Cut,
    ranges: Mapping[str, Range],
    sequence: SequenceEntry | None = None,
) -> dict[str, Profile]:
    """Return the profiles of each graph's inputs; weights have fixed shapes and need none.

    Args:
        graphs: Every graph of the bundle.
        policies: Policies by name.
        cut: The model, cut.
        ranges: What `dim_ranges` returned.
        sequence: How ranks share a sequence, or None.
    """
    deepest = max((p.spec.history.maximum for p in policies.values()), default=1)
    ranges = {**ranges, "slots": (1, min(2, deepest), deepest)}
    by_graph = {p.graph: p for p in policies.values()}
    if sequence is not None:
        ranges |= _shared_ranges(graphs, ranges, sequence)
        pairs = sequence.policies.items()
        by_graph |= {graph: policies[name] for name, pair in pairs for graph in pair}
    return {
        name: _profile(
            graph,
            _decide_ranges(by_graph[name], cut, ranges) if name in by_graph else ranges,
        )
        for name, graph in graphs.items()
    }


def _shared_ranges(
    graphs: Mapping[str, GraphEntry], ranges: Mapping[str, Range], sequence: SequenceEntry
) -> dict[str, Range]:
    """Return the ranges of what one of several ranks has: from one token, or head, to all of them."""
    found: dict[str, Range] = {}
    plain = dict.fromkeys(d for dims in sequence.shared.values() for d in dims)
    for dim in [*plain, *sequence.sums]:
        terms = [ranges[term] for term in sequence.sums.get(dim, [dim])]
        usual, largest = (sum(term[corner] for term in terms) for corner in (1, 2))
        found[f"{LOCAL}{dim}"] = len(terms), max(usual // USUAL_RANKS, len(terms)), largest
    made = (g.outputs.items() for g in graphs.values() if g.runs == "part")
    heads = max(
        (int(io.shape[0]) for ios in made for n, io in ios if n.startswith("query_")), default=1
    )
    largest, usual = (max(r[corner] for r in found.values()) for corner in (2, 1))
    batch = ranges["batch"]
    everything = 1, min(usual * USUAL_RANKS, largest), largest
    return {
        **found,
        "attention_queries": everything,
        "attention_keys": everything,
        "attention_rows": (1, max(heads * batch[1] // USUAL_RANKS, 1), heads * batch[2]),
    }


def _spread(carried: Sequence[Size], name: str) -> Range:
    """Return the range of a size over all configs; the first config's is the usual one."""
    if name == "batch":
        return 1, 1, 1
    found = [getattr(size, name) for size in carried]
    return min(found), found[0], max(found)


def _profile(graph: GraphEntry, ranges: Mapping[str, Range]) -> Profile:
    return {
        name: tuple(_shape(entry.shape, ranges, corner) for corner in range(3))  # type: ignore[misc]  # three of them
        for name, entry in graph.inputs.items()
        if any(isinstance(dim, str) for dim in entry.shape)
    }


def _shape(shape: Sequence[int | str], ranges: Mapping[str, Range], corner: int) -> tuple[int, ...]:
    return tuple(ranges[dim][corner] if isinstance(dim, str) else dim for dim in shape)


def _decide_ranges(policy: PolicyEntry, cut: Cut, ranges: Mapping[str, Range]) -> dict[str, Range]:
    """Return the ranges of a policy graph's own dimensions.

    A signal is a row of a table, or a tensor with all but its last dimension flattened; a feature
    is one batch element's, frame by frame, or with all but its last two dimensions flattened.
    """
    outputs: dict[str, Any] = {n: s for g in cut.segments for n, s in g.outputs.items()}
    tokens, per_frame = ranges["tokens"], ranges["tokens_per_frame"]
    frames = [t // p for t, p in zip(tokens, per_frame, strict=True)]
    channels = int(outputs["hidden"].shape[-1])
    found: dict[str, Range] = {
        "frames": (frames[0], frames[1], frames[2]),
        "tokens_per_frame": per_frame,
        "channels": (channels,) * 3,
    }
    if policy.spec.feature == "model_output":
        corners = [_shape(outputs["model_output"].shape, ranges, c)[1:] for c in range(3)]
        found["frames"] = _range(prod(c[:-2]) for c in corners)
        found["tokens_per_frame"] = _range(c[-2] for c in corners)
        found["channels"] = _range(c[-1] for c in corners)
    known = signals_of(cut)
    signals = [s for s in policy.spec.signals if s in known]
    if signals:
        rows, widths = [], []
        for kind in signals:
            spec, is_row = signal_spec(cut, kind), known[kind][1] == "run"
            corners = [_shape(spec.shape, ranges, c) for c in range(3)]
            rows.append(_range(1 if is_row else prod(c[:-1]) for c in corners))
            widths.append(_range(c[-1] for c in corners))
        found["width"] = (min(w[0] for w in widths), widths[0][1], max(w[2] for w in widths))
        found["rows"] = (min(r[0] for r in rows), rows[0][1], max(r[2] for r in rows))
    return found


def _range(corners: Iterable[int]) -> Range:
    least, usual, most = corners
    return least, usual, most
