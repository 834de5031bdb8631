# SPDX-License-Identifier: Apache-2.0
"""Tell what a model's cut consists of: segments, stages, weights, operations; what no step computes.

Operations are counted as `compiler.forecast.flops` counts them, by PyTorch's own counter, on tensors without
data. They are those of one step; what is computed ahead of the steps counts as if each step did it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import groupby
from math import prod
from typing import Any

import diffusers
import sympy
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ...core.errors import CheckpointError, nearest
from .cut import cut_model
from .models import MODELS, row_of
from .prove import random_inputs
from .reads import late_values, own_places
from .row import Row
from .skeleton import skeleton
from .words import Call, Cut, Segment

__all__ = ["describe", "describe_model"]

USUAL = {
    "batch": 1, "frames": 21, "height": 30, "width": 52, "tokens": 4096, "text_tokens": 512,
    "text_tokens_2": 77, "image_tokens": 257, "audio_tokens": 512, "rows": 64, "columns": 64,
}  # fmt: skip
"""Sizes to count operations at: a video of 81 frames at 480p, an image of 1024 × 1024. A model whose
tables are too small for them, as a test's may be, is counted at the sizes it was traced with."""

AHEAD = ("shape", "prompt", "run", "context", "modulation")
"""Moments of segments that run before the first step."""


def describe_model(model: str, config: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """Cut a transformer and describe the cut.

    Args:
        model: Diffusers class.
        config: Its config.
        where: Where the two stand, for errors.

    Raises:
        CheckpointError: a class that the table of models does not have.
        ExportError: it can't be cut.
    """
    row = row_of(model)
    if row is None:
        known = [one.model for one in MODELS]
        raise CheckpointError(where, f"'{model}' has no row in the table", nearest(model, known))
    model_class = getattr(diffusers, model)
    with_defaults: Any = skeleton(model_class, config)[0].config
    return describe(cut_model(row, model_class, config), row, with_defaults)


def describe(cut: Cut, row: Row, config: Mapping[str, Any]) -> dict[str, Any]:
    """Describe a cut.

    Args:
        cut: The cut.
        row: The model's row, for its sizes.
        config: The model's config, with defaults.

    Returns:
        Plain data, as ``inspect --cut --json`` prints it. ``segments``: per segment when it runs, how
        often, inputs, outputs, weights and operations of all its calls. ``stages``: runs of equal
        blocks. ``ahead``: per moment before the first step, weights and operations that no step needs,
        and their shares of the model's. ``edges``: which segment's values another reads.
    """
    sizes = row.sizes(config, USUAL)
    if not all(_holds(one.condition, sizes) for one in cut.domain):
        sizes = row.sizes(config)
    shapes = _weight_shapes(cut)
    flops = _flops(cut, random_inputs(row, config, sizes), shapes)
    calls = {name: [c for c in cut.calls if c.segment == name] for name in cut.segments}
    segments = [
        {
            "name": name,
            "runs": cut.segments[name].runs,
            "calls": len(calls[name]),
            "weights": sum(prod(shapes[n]) for n in _weights(cut.segments[name], calls[name])),
            "flops": flops[name] * len(calls[name]),
            "inputs": list(cut.segments[name].inputs),
            "outputs": list(cut.segments[name].outputs),
        }
        for name in flops
    ]
    return {
        "model": row.model,
        "sizes": {name: size for name, size in sizes.items() if _has(row, name)},
        "segments": segments,
        "stages": _stages(cut),
        "ahead": _ahead(segments, sum(map(prod, shapes.values()))),
        "edges": [[*pair, list(names)] for pair, names in _edges(cut).items()],
    }


def _holds(condition: sympy.Basic, sizes: Mapping[str, int]) -> bool:
    named = {s: sizes[str(s)] for s in condition.free_symbols if str(s) in sizes}
    return bool(condition.xreplace(named) != sympy.false)


def _has(row: Row, size: str) -> bool:
    return re.search(rf"\b{size}\b", str(row.inputs)) is not None


def _weights(segment: Segment, calls: Iterable[Call]) -> set[str]:
    """Return a segment's weights, as the checkpoint names them."""
    names = [name for name, _ in segment.module.named_parameters()]
    return {f"{call.block}.{n}" if call.block else n for call in calls for n in names}


def _weight_shapes(cut: Cut) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for call in cut.calls:
        prefix = f"{call.block}." if call.block else ""
        for name, weight in cut.segments[call.segment].module.named_parameters():
            shapes[prefix + name] = tuple(weight.shape)
    return shapes


def _flops(
    cut: Cut, inputs: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, int]:
    """Return the operations of one call of each segment; equal calls are counted once."""
    counted: dict[str, int] = {}
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        values: dict[str, Any] = {
            name: mode.from_tensor(one) if isinstance(one, Tensor) else one
            for name, one in inputs.items()
        } | {name: torch.empty(shape) for name, shape in shapes.items()}
        made: dict[str, tuple[Tensor, ...]] = {}
        for call in cut.calls:
            segment = cut.segments[call.segment]
            if call.segment not in made:
                prefix = f"{call.block}." if call.block else ""
                own = {n: values[prefix + n] for n, _ in segment.module.named_parameters()}
                given = tuple(values[name] for name in call.inputs)
                with FlopCounterMode(display=False) as counter:
                    made[call.segment] = torch.func.functional_call(segment.module, own, given)
                counted[call.segment] = int(counter.get_total_flops())
            values.update(zip(call.outputs, made[call.segment], strict=True))
    return counted


def _stages(cut: Cut) -> list[dict[str, Any]]:
    """Return the runs of equal blocks, in order, with the segments that share their weights."""
    ahead: dict[str, dict[str, str]] = {}
    for call in cut.calls:
        runs = cut.segments[call.segment].runs
        if call.block and runs != "block":
            ahead.setdefault(call.block, {})[runs] = call.segment
    blocks = [c for c in cut.calls if c.block and cut.segments[c.segment].runs == "block"]
    stages = []
    for segment, group in groupby(blocks, key=lambda call: call.segment):
        members = [call.block for call in group]
        found = {"block": segment, **ahead.get(members[0], {})}
        stages.append({"first": members[0], "count": len(members), **found})
    return stages


def _ahead(segments: list[dict[str, Any]], weights: int) -> dict[str, dict[str, float]]:
    """Return what is computed before the first step, by moment."""
    operations = sum(s["flops"] for s in segments)
    found = {}
    for runs in AHEAD:
        own = [s for s in segments if s["runs"] == runs]
        if own:
            held, done = (sum(s[key] for s in own) for key in ("weights", "flops"))
            found[runs] = {
                "weights": held,
                "weights_share": held / weights,
                "flops": done,
                "flops_share": done / operations,
            }
    return found


def _edges(cut: Cut) -> dict[tuple[str, str], dict[str, None]]:
    """Return segment or ``inputs`` and segment or ``results`` → values that the one gives the other.

    Blocks of a template are one; a value bears its name without the block. Values that blocks read
    each for itself are one too: ``temb of each block``.
    """
    maker = dict.fromkeys(cut.inputs, ("inputs", ""))
    own = {
        (segment, i): f"{next(iter(values.values()))} of each block"
        for segment in cut.segments
        for i, values in own_places(cut, segment).items()
        if not late_values(cut, values)
    }
    edges: dict[tuple[str, str], dict[str, None]] = {}
    for call in cut.calls:
        for i, name in enumerate(call.inputs):
            if name in maker:
                source, block = maker[name]
                said = own.get((call.segment, i), name.removeprefix(f"{block}."))
                edges.setdefault((source, call.segment), {})[said] = None
        maker.update((name, (call.segment, call.block)) for name in call.outputs)
    for name in cut.results:
        edges.setdefault((maker[name][0], "results"), {})[name] = None
    return edges
