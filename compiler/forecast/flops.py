# SPDX-License-Identifier: Apache-2.0
"""Count the floating-point operations of a cut model at any size, without weights or a run.

PyTorch's own counter watches each segment on the ``meta`` device. It counts matrix products,
attention and convolutions, two per multiply-add; element-wise work (norms, activations, `delta`)
counts as nothing, as in the field's tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..cut.declared import Cut, Segment
from ..graphs.caching import caching_of
from ..graphs.filters import filter_segments
from ..sizes import shape_at

__all__ = ["StepFlops", "flops_of", "segment_flops", "step_flops"]


@dataclass(frozen=True)
class StepFlops:
    """Operations of one branch at one size.

    Attributes:
        segments: Graph name → operations of one run of it; block templates once.
        computed: Of a computed step, the signal's segment excepted.
        reused: Of a reused step, likewise.
        prompt: Once per prompt: text states to every block's context, and tables that see it.
        run: Once per run: what is made of all timesteps alone.
    """

    segments: Mapping[str, int]
    computed: int
    reused: int
    prompt: int
    run: int


def flops_of(segment: Segment, dims: Mapping[str, int]) -> int:
    """Count one run of a segment.

    Args:
        segment: A segment with its module on ``meta``.
        dims: Size of every named dimension of its inputs.
    """
    example = meta_inputs(segment, dims)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        segment.module(**example)
    return int(counter.get_total_flops())


def meta_inputs(segment: Segment, dims: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """Return inputs without data for a segment."""
    return {
        name: torch.empty(shape_at(spec, dims), dtype=getattr(torch, spec.dtype), device="meta")
        for name, spec in segment.inputs.items()
    }


def segment_flops(cut: Cut, dims: Mapping[str, int], slots: int = 1) -> dict[str, int]:
    """Count one run of every graph but the policies'.

    Args:
        cut: The cut model.
        dims: Size of every named dimension.
        slots: Residuals that `reuse` mixes.
    """
    segments = (*cut.segments, *caching_of(cut), *filter_segments(cut))
    return {s.name: flops_of(s, {**dims, "slots": slots}) for s in segments}


def step_flops(cut: Cut, dims: Mapping[str, int], slots: int = 1) -> StepFlops:
    """Count what a computed and a reused step of one branch do, and a new prompt.

    Args:
        cut: The cut model.
        dims: Size of every named dimension.
        slots: Residuals that `reuse` mixes.
    """
    counted = segment_flops(cut, dims, slots)
    around = sum(counted[s.name] for s in cut.segments if s.runs == "step")
    body = sum(counted[s.block] * s.count for s in cut.stages)
    context = sum(counted[s.context] * s.count for s in cut.stages if s.context is not None)
    prompt = sum(counted[s.name] for s in cut.segments if s.runs == "prompt")
    modulation = dict.fromkeys((False, True), 0)
    for stage in cut.stages:
        if stage.modulation is not None:
            modulation[cut.reads_prompt(stage)] += counted[stage.modulation] * stage.count
    return StepFlops(
        segments=counted,
        computed=around + body + counted["delta"],
        reused=around + counted["reuse"],
        prompt=prompt + context + modulation[True],
        run=sum(counted[s.name] for s in cut.segments if s.runs == "run") + modulation[False],
    )
