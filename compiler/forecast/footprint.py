# SPDX-License-Identifier: Apache-2.0
"""Forecast the memory of a run at a size: what a session will allocate, from declarations alone.

The buffers are those of `runtime.session`, `runtime.body` and `runtime.branch_cache`, counted from the cut
instead of from a bundle, so that the forecast can be had before anything is built.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ...bundle.sections import Sections, beside_cached, divide
from ...core.dtypes import ITEM_BYTES
from ...engines.base import TensorSpec
from ...policies.setting import CacheSetting
from ...policies.spec import PolicySpec
from ...runtime.offload import SLABS
from ..cut.declared import FIRST_BLOCK_RESIDUAL, Cut, Segment
from ..graphs.filters import signal_spec, signals_of
from ..sizes import shape_at
from .flops import meta_inputs

__all__ = [
    "CacheBytes",
    "Footprint",
    "LiveBytes",
    "Verdict",
    "activation_bytes",
    "amount",
    "cache_bytes",
    "fit_verdict",
    "footprint_of",
]

HIDDEN_BUFFERS = 3
"""`hidden`, which is kept for the residual, and the two that blocks write in turn."""

PROMPT_COPIES = 2
"""A session keeps the states it was given, to know a new prompt, and those its engines read."""


@dataclass(frozen=True)
class CacheBytes:
    """What a cache setting adds to one branch.

    Attributes:
        slots: Residuals kept.
        history_bytes: Of those residuals.
        signal_bytes: This step's signal and the previous one's, and what first blocks leave.
        feature_bytes: The tapped feature of the last two computed steps.
    """

    slots: int
    history_bytes: int
    signal_bytes: int
    feature_bytes: int

    @property
    def total_bytes(self) -> int:
        """Sum of all."""
        return self.history_bytes + self.signal_bytes + self.feature_bytes


@dataclass(frozen=True)
class Footprint:
    """Memory of a run at one size; see each attribute for whether it counts once or per branch.

    Attributes:
        branches: Branches of the run.
        experts: Transformers of the run; each has all of the below but activations for itself.
        weight_bytes: Every tensor that the graphs take, once; memory-mapped on CPU backends.
        offloaded_weight_bytes: Of these, what a GPU holds where block weights stay on the host.
        shared_bytes: Buffer → bytes, once: latents, rotary tables, hidden states, timestep tables.
        branch_bytes: Buffer → bytes, per branch: prompt states, context, its keys and values of
            every block, model output.
        activation_bytes: Graph → estimate of what its engine needs besides, at most one at a time.
        caches: Setting → bytes per branch.
    """

    branches: int
    experts: int
    weight_bytes: int
    offloaded_weight_bytes: int
    shared_bytes: Mapping[str, int]
    branch_bytes: Mapping[str, int]
    activation_bytes: Mapping[str, int]
    caches: Mapping[str, CacheBytes]

    def parts(self, setting: str, *, offload: bool = False) -> dict[str, int]:
        """Return the bytes of a run under one of `caches`, branches and experts added up."""
        cache = self.caches[setting]
        weights = self.offloaded_weight_bytes if offload else self.weight_bytes
        branches = self.experts * self.branches
        return {
            "weights": self.experts * weights,
            "hidden buffers": self.experts * sum(self.shared_bytes.values()),
            "prompt and context": branches * sum(self.branch_bytes.values()),
            "residual history": branches * cache.history_bytes,
            "signals and features": branches * (cache.signal_bytes + cache.feature_bytes),
            "activations": max(self.activation_bytes.values(), default=0),
        }

    def as_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "branches": self.branches,
            "experts": self.experts,
            "weight_bytes": self.weight_bytes,
            "offloaded_weight_bytes": self.offloaded_weight_bytes,
            "shared_bytes": dict(self.shared_bytes),
            "branch_bytes": dict(self.branch_bytes),
            "activation_bytes": dict(self.activation_bytes),
            "caches": {
                name: {**vars(cache), "total_bytes": sum(self.parts(name).values())}
                for name, cache in self.caches.items()
            },
        }


def footprint_of(
    cut: Cut,
    dims: Mapping[str, int],
    *,
    branches: int,
    settings: Mapping[str, CacheSetting],
    specs: Mapping[str, PolicySpec],
    experts: int = 1,
) -> Footprint:
    """Forecast the memory of a run.

    Args:
        cut: The cut model.
        dims: Size of every named dimension in one branch, ``steps`` included.
        branches: 2 with guidance, else 1.
        settings: Cache settings to forecast for, by any name.
        specs: Policy name → declaration.
        experts: Transformers that share the graphs, each with weights and buffers of its own.

    Raises:
        ConfigError: a setting's parameter is unknown or out of range.
    """
    sized = {n: _bytes(i.spec, dims) for n, i in cut.inputs.items()}
    tables = _outputs(cut, ("run",), dims)
    rows = {n: b // dims["steps"] for n, b in tables.items()}
    of_blocks = {by_prompt: _block_table_bytes(cut, dims, by_prompt) for by_prompt in (False, True)}
    shared = {n: sized[n] for n, i in cut.inputs.items() if i.runs == "step"}
    shared |= _outputs(cut, ("shape",), dims)
    shared["hidden states"] = HIDDEN_BUFFERS * _bytes_of(cut.cached, dims)
    shared["timestep tables"] = sum(tables.values()) + sum(rows.values()) + of_blocks[False]
    prompt = sum(b for n, b in sized.items() if cut.inputs[n].runs == "prompt")
    pairs = sum(
        stage.count * _bytes(spec, dims)
        for stage in cut.stages
        if stage.context is not None
        for spec in _segment(cut, stage.context).outputs.values()
    )
    return Footprint(
        branches=branches,
        experts=experts,
        weight_bytes=_weight_bytes(cut),
        offloaded_weight_bytes=_offloaded_bytes(cut),
        shared_bytes=shared,
        branch_bytes={
            "prompt states": PROMPT_COPIES * prompt,
            **_outputs(cut, ("prompt",), dims),
            "context keys and values": pairs,
            "skip connections": _skip_bytes(cut, dims),
            "timestep tables": of_blocks[True],
            "model_output": _bytes_of(_segment(cut, "finish").outputs, dims),
        },
        activation_bytes={
            s.name: activation_bytes(s, dims)
            for s in cut.segments
            if s.runs in ("prompt", "prompt_block", "run_block", "step", "block")
        },
        caches={n: cache_bytes(cut, dims, s, specs[s.policy]) for n, s in settings.items()},
    )


def _weight_bytes(cut: Cut) -> int:
    return sum(_size(*weight) for weight in cut.weights().values())


def _offloaded_bytes(cut: Cut) -> int:
    """Return the bytes of weights on the device where `runtime.offload` holds those of blocks."""
    templates = {n for s in cut.stages for n in (s.block, s.context, s.modulation)}
    tapped = {stage.tapped for stage in cut.stages}  # shares its block's
    once = [s for s in cut.segments if s.name not in templates | tapped]
    resident = _weight_bytes(replace(cut, segments=tuple(once)))
    for segment in cut.segments:
        if segment.name in templates:
            blocks = cut.blocks_of(segment.name)
            all_bytes = _weight_bytes(replace(cut, segments=(segment,)))
            resident += all_bytes // len(blocks) * min(SLABS, len(blocks))
    return resident


def _block_table_bytes(cut: Cut, dims: Mapping[str, int], by_prompt: bool) -> int:
    """Return the bytes of what blocks make of the timesteps: all steps', and the current one's row."""
    batch = dims.get("batch", 1) if by_prompt else 1
    sized = {**dims, "steps": dims["steps"] * batch}
    total = 0
    for stage in cut.stages:
        if stage.modulation is None or cut.reads_prompt(stage) != by_prompt:
            continue
        table = _bytes_of(_segment(cut, stage.modulation).outputs, sized)
        total += stage.count * (table + table // dims["steps"])
    return total


def _skip_bytes(cut: Cut, dims: Mapping[str, int]) -> int:
    """Return the bytes of what blocks leave for later stages, each once."""
    makers = [stage.block for stage in cut.stages for _ in range(stage.count)]
    kept = {
        (skip.stream, place)
        for stage in cut.stages
        for skip in stage.skips.values()
        for place in skip.blocks
    }
    return sum(
        _bytes(_segment(cut, makers[place]).outputs[f"{stream}_out"], dims)
        for stream, place in kept
    )


def cache_bytes(
    cut: Cut, dims: Mapping[str, int], setting: CacheSetting, spec: PolicySpec
) -> CacheBytes:
    """Return what a setting adds to one branch.

    Raises:
        ConfigError: a parameter is unknown or out of range.
    """
    slots = spec.history.kept(spec.resolve(setting.parameters))
    signals = signals_of(cut)
    signal = spec.signal_of(setting.signal, signals)
    signal_bytes, kept = 0, list(cut.cached.values())
    if signal is not None:
        value, known = signals[signal]
        buffers = 1 + sum(name.endswith("_signal") for name in spec.kept)
        table = _bytes(signal_spec(cut, signal), {**dims, "steps": 1} if known == "run" else dims)
        signal_bytes = buffers * table
        if value == FIRST_BLOCK_RESIDUAL:
            graphs = {segment.name: segment for segment in cut.segments}
            always = spec.always_run(spec.resolve(setting.parameters))
            sections = divide(cut.stages, graphs, list(cut.cached), *always)
            beside = beside_cached(cut.stages, graphs, list(cut.cached))
            kept += [
                TensorSpec(beside[s].dtype, tuple(beside[s].shape))
                for s in sections.streams
                if s in beside
            ]
            signal_bytes += _left_bytes(cut, dims, sections)
    tapped = next((_segment(cut, s.tapped) for s in cut.stages if s.tapped is not None), None)
    feature_bytes = 0
    if spec.feature == "attention_output" and tapped is not None:
        feature_bytes = 2 * _bytes(tapped.outputs[spec.feature], dims)
    elif spec.feature == "model_output":
        finish = next(s for s in cut.segments if "model_output" in s.outputs)
        feature_bytes = 2 * _bytes(finish.outputs["model_output"], dims)
    return CacheBytes(
        slots=slots,
        history_bytes=slots * sum(_size(cut.history_dtype, shape_at(spec, dims)) for spec in kept),
        signal_bytes=signal_bytes,
        feature_bytes=feature_bytes,
    )


def _left_bytes(cut: Cut, dims: Mapping[str, int], sections: Sections) -> int:
    """Return the bytes of what sections leave for those behind them, as `runtime.body` keeps it."""
    blocks = [_segment(cut, stage.block) for stage in cut.stages for _ in range(stage.count)]
    outputs = {n for block in blocks for n in block.outputs if n.endswith("_out")}
    skips = {
        (f"{k.stream}_out", place)
        for s in cut.stages
        for k in s.skips.values()
        for place in k.blocks
    }
    left: set[tuple[str, int]] = set()
    for name in outputs:
        writers = [i for i, block in enumerate(blocks) if name in block.outputs]
        for at in (sections.begin, sections.end):
            before = [i for i in writers if i < at]
            if 0 < len(before) < len(writers):
                left.add((name, before[-1]))
    return sum(_bytes(blocks[i].outputs[name], dims) for name, i in left - skips)


@dataclass(frozen=True)
class Verdict:
    """What it means that a run needs more memory than there is.

    Attributes:
        text: Says so, with the number that decides.
        runs: Whether it works all the same, reading mapped weights again and again.
    """

    text: str
    runs: bool


def fit_verdict(parts: Mapping[str, int], available: int | None, *, mapped: bool) -> Verdict | None:
    """Say whether the parts fit into what is available; None when they do or nobody knows.

    Args:
        parts: Part → bytes.
        available: Bytes of memory left, or None where unknown.
        mapped: Whether weights are memory-mapped, so that a run works without holding them.
    """
    needed = sum(parts.values())
    if available is None or needed <= available:
        return None
    held = {n: b for n, b in parts.items() if not (mapped and n == "weights")}
    runs = sum(held.values()) <= available
    name, largest = max((parts if runs else held).items(), key=lambda p: p[1])
    text = (
        f"will not fit: {amount(needed)} needed, {amount(available)} available; "
        f"{name} decide: {amount(largest)}"
    )
    if runs:
        text += "; weights are memory-mapped, so it runs, reading them again at every computed step"
    return Verdict(text, runs)


def amount(count: int) -> str:
    """Spell a count of bytes with its unit."""
    for unit, size in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"


def activation_bytes(segment: Segment, dims: Mapping[str, int]) -> int:
    """Estimate what an engine needs besides its bindings: the peak of PyTorch's intermediates.

    Attention is taken as one fused node, which holds no scores. Engines fuse more than PyTorch, and
    reuse memory less tightly: what they report lies near, on either side.
    """
    example = meta_inputs(segment, dims)
    live = LiveBytes()
    with _FusedAttention(), live, torch.no_grad():
        segment.module(**example)
    return live.peak


ATTENTION = (F.scaled_dot_product_attention, torch.ops.aten.scaled_dot_product_attention.default)


class _FusedAttention(TorchFunctionMode):
    """Take attention as an operator whose only allocation is its output."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in ATTENTION:
            return torch.empty_like(args[0])
        return func(*args, **(kwargs or {}))


class LiveBytes(TorchDispatchMode):
    """Follow the storages that operators allocate, until nothing refers to them.

    Attributes:
        peak: Most bytes that lived at once.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self.peak = 0
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        given = {_key(t) for t in args if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and _key(tensor) not in given:
                storage = tensor.untyped_storage()
                alive = StorageWeakRef(storage)
                self._storages.setdefault(_key(tensor), (alive, storage.nbytes()))
        self._storages = {k: e for k, e in self._storages.items() if not e[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._storages.values()))
        return result


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _segment(cut: Cut, name: str | None) -> Segment:
    return next(s for s in cut.segments if s.name == name)


def _outputs(cut: Cut, runs: tuple[str, ...], dims: Mapping[str, int]) -> dict[str, int]:
    return {
        n: _bytes(spec, dims)
        for s in cut.segments
        if s.runs in runs
        for n, spec in s.outputs.items()
        if n not in s.dropped
    }


def _bytes(spec: TensorSpec, dims: Mapping[str, int]) -> int:
    return _size(spec.dtype, shape_at(spec, dims))


def _bytes_of(specs: Mapping[str, TensorSpec], dims: Mapping[str, int]) -> int:
    return sum(_bytes(spec, dims) for spec in specs.values())


def _size(dtype: str, shape: tuple[int, ...]) -> int:
    return prod(shape) * ITEM_BYTES[dtype]
