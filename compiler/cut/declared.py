# SPDX-License-Identifier: Apache-2.0
"""A cut in the bundle's words: segments, stages, inputs, and nothing else.

`Segment`s are PyTorch modules on the ``meta`` device with named, typed inputs and outputs. Stages,
which say in which order the block templates make up ``body``, and inputs are the manifest's own
entries. No engine and no policy is known here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from ...bundle.manifest import InputEntry, LimitEntry, StageEntry, SumTerm
from ...bundle.streams import HIDDEN
from ...core.dtypes import Precision
from ...engines.base import TensorSpec

__all__ = [
    "Cut",
    "DimFactor",
    "Runs",
    "Segment",
    "StoredDtype",
]

Runs = Literal[
    "prompt", "prompt_block", "run", "run_block", "shape", "step", "signal", "probe", "block",
    "computed", "reused", "text_encoder", "vae_decode", "part", "attention",
]  # fmt: skip
"""When a graph runs: once per prompt, once per prompt and block, once per run, once per run and
block, once per latent shape, every step, on steps whose policy wants its signal, after a probed first
block, once per block of a computed step, after a computed body, on a reused step, before and after
the loop; over ranks that share a sequence, in place of the graph that it is a part of."""

StoredDtype = Callable[[str], str]
"""Checkpoint tensor name → dtype it is stored in."""

DimFactor = tuple[str, int]


FIRST_BLOCK_RESIDUAL = "first_block_residual"
"""Signal, and the graph that gives it: what the first block that passes ``hidden`` on adds to it."""


@dataclass(frozen=True)
class Segment:
    """One graph to trace.

    Attributes:
        name: Graph name.
        runs: Dependency class.
        module: Traced module on ``meta``; its parameters are the graph's weights, named as in the
            checkpoint below ``prefix``, in the dtype the graph takes them in.
        inputs: Argument name → spec, in the order of ``module.forward``.
        outputs: Output name → spec, in the order in which ``module`` returns them.
        dropped: Outputs to leave out of this graph. Segments that share a module are traced once.
        prefix: What precedes parameter names in the checkpoint; ``{block}`` for block templates.
        precision: Precision the graph computes in, as backends are told.
    """

    name: str
    runs: Runs
    module: torch.nn.Module
    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    prefix: str = ""
    precision: Precision = "float32"
    dropped: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cut:
    """One model, cut.

    Attributes:
        segments: Every graph but the policies'.
        stages: The block loop.
        inputs: What callers hand in, by name.
        signals: Signal kind → the value that carries it and when it is known
            (``run``: ahead of the loop, so decisions fold; ``step``: after ``head``). Every cut
            adds ``latents``, and ``first_block_residual`` where two blocks pass ``hidden`` on.
        feature_block: Index of the block whose feature is tapped.
        dims: Derived dimension → product of floor divisions of others. Where an input has it too,
            both must agree. Those over ``frames``, ``height`` and ``width`` of the latents
            serve forecasts also where no input has these.
        sums: Dimension → what it is the sum of, as text and image tokens in one sequence are:
            others, numbers, and others rounded up to a multiple.
        unread: Tensors that the model has and its `forward` does not read.
        arguments: Other arguments that pipelines give `forward`, a nested one with its place → the
            one value that they may have; None where any gives the same.
        history_dtype: dtype in which residuals are kept.
        example_dims: Sizes to trace with.
        latent_scale: Frames and pixels per latent, where the VAE's config does not tell.
        limits: Dimension → the largest size that the model has positions for, and where.
        usual: Dimension of the prompt's inputs that no config tells → what it usually is.
    """

    segments: tuple[Segment, ...]
    stages: tuple[StageEntry, ...]
    inputs: Mapping[str, InputEntry]
    signals: Mapping[str, tuple[str, Literal["run", "step"]]]
    feature_block: int
    dims: Mapping[str, tuple[DimFactor, ...]]
    history_dtype: str
    example_dims: Mapping[str, int] = field(default_factory=dict)
    latent_scale: tuple[int, int] = (4, 8)
    limits: Mapping[str, LimitEntry] = field(default_factory=dict)
    sums: Mapping[str, tuple[SumTerm, ...]] = field(default_factory=dict)
    unread: frozenset[str] = frozenset()
    usual: Mapping[str, int] = field(default_factory=dict)
    arguments: Mapping[str, bool | int | float | str | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Add the signals that need no segment of the family's own."""
        passed_on = {s.name for s in self.segments if "hidden_out" in s.outputs}
        blocks = sum(s.count for s in self.stages if s.block in passed_on)
        added: dict[str, tuple[str, Literal["run", "step"]]] = {"latents": ("latents", "step")}
        if blocks >= 2:
            added[FIRST_BLOCK_RESIDUAL] = (FIRST_BLOCK_RESIDUAL, "step")
        object.__setattr__(self, "signals", {**self.signals, **added})

    @property
    def cached(self) -> dict[str, TensorSpec]:
        """Return the streams whose residuals are kept, ``hidden`` first."""
        given = {s.name: s for s in self.segments}
        begun, read = given["head"].outputs, given["finish"].inputs
        streams = [HIDDEN, *(n for n in begun if n != HIDDEN and f"{n}_out" in read)]
        return {stream: begun[stream] for stream in streams}

    def signal_spec(self, kind: str) -> TensorSpec:
        """Return dtype and dimensions of the value that carries a signal, a table's where it is one."""
        value, _ = self.signals[kind]
        if value in self.inputs:
            return self.inputs[value].spec
        outputs = {n: spec for s in self.segments for n, spec in s.outputs.items()}
        return outputs["hidden"] if value == FIRST_BLOCK_RESIDUAL else outputs[value]

    def weights(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return every checkpoint tensor that the graphs take: name → dtype and shape."""
        return {
            segment.prefix.replace("{block}", str(index)) + name: (
                str(parameter.dtype).removeprefix("torch."),
                tuple(parameter.shape),
            )
            for segment in self.segments
            for name, parameter in segment.module.named_parameters()
            for index in self.blocks_of(segment.name)
        }

    def reads_prompt(self, stage: StageEntry) -> bool:
        """Tell whether what a stage's ``modulation`` makes is another for each prompt."""
        given = {n: s for s in self.segments for n in s.outputs}
        (graph,) = (s for s in self.segments if s.name == stage.modulation)
        read = {v for n in graph.inputs for v in stage.reads.get(n, (n,))}
        return any(v not in given or given[v].runs == "prompt" for v in read)

    def blocks_of(self, segment: str) -> list[int]:
        """Return which blocks' weights a segment takes; one nominal block outside ``body``."""
        blocks = [
            block
            for stage in self.stages
            if segment in (stage.block, stage.context, stage.modulation, stage.tapped)
            for block in range(stage.first, stage.first + stage.count)
        ]
        return blocks or [0]
