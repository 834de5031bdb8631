# SPDX-License-Identifier: Apache-2.0
"""Forecast what a build and its runs will need, from a checkpoint's config and headers alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from ...core.dtypes import ITEM_BYTES
from ...engines.host import disk_free_bytes, existing_parent
from ..checkpoints.checkpoint import Checkpoint, expert_prefixes
from ..checkpoints.sources import lies_as
from ..cut.declared import Cut
from ..plan import Plan
from ..sizes import Size, size_of
from .footprint import amount
from .run import forecast_run, render_forecast

__all__ = ["AbsentBackend", "describe_plan", "forecast_disk", "render_plan"]

LINKING_BACKENDS = ("onnxruntime",)
"""Whose engines share baked weights with the bundle; the others' hold a copy."""


@dataclass(frozen=True)
class AbsentBackend:
    """A backend that this machine can't build for, as far as a forecast asks for one."""

    name: str

    def takes_float8(self, target: object) -> bool:
        """Tell that engines do: GPUs from compute capability 8.9 on have the numbers, as CPUs do."""
        return True


def describe_plan(
    planned: Plan, size: Size | None = None, *, offload: bool = False
) -> dict[str, Any]:
    """Say what a build and a run of it would do and need, as ``build --dry-run --json`` prints it.

    Args:
        planned: What would be built.
        size: Size of the run; None takes the default config's.
        offload: As `forecast_memory` takes it.

    Raises:
        RequestError: a size that VAE or patches do not divide.
    """
    manifest, checkpoint = planned.manifest, planned.checkpoint
    backends = [backend.name for backend, _ in planned.backends]
    forecast = forecast_run(
        manifest,
        planned.cut,
        size or size_of(manifest.configs[manifest.default_config].generation),
        pipeline=checkpoint.pipeline,
        backend=backends[0],
        offload=offload,
    )
    disk = forecast_disk(
        checkpoint,
        planned.cut,
        backends=backends,
        baked=manifest.weights == "baked",
        out=planned.out,
    )
    return {
        "family": manifest.family,
        "blocks": manifest.block_count,
        "graphs": planned.graph_count,
        "policies": list(manifest.policies),
        "tensors": len(checkpoint.tensors),
        "notes": list(checkpoint.notes),
        "checkpoint_bytes": sum(t.bytes for t in checkpoint.tensors.values()),
        "backends": backends,
        "precision": manifest.precision,
        "ranges": planned.ranges,
        "out": str(planned.out),
        "forecast": {**forecast, "disk": disk},
    }


def forecast_disk(
    checkpoint: Checkpoint, cut: Cut, *, backends: Sequence[str], baked: bool, out: Path
) -> dict[str, Any]:
    """Forecast the disk that a bundle takes; graphs and template engines, a few MB, are left out.

    Args:
        checkpoint: Where weights lie, and in what dtype.
        cut: The checkpoint's model, cut.
        backends: Backends to compile for.
        baked: Whether engines hold weights.
        out: The bundle's folder to be.
    """
    stored = checkpoint.tensors
    in_body = _body_weights(cut)
    linkable = converted = body = 0
    for prefix in expert_prefixes(checkpoint):
        for name, (dtype, shape) in cut.weights().items():
            size = prod(shape) * ITEM_BYTES[dtype]
            own = prefix + name
            is_as_stored = own in stored and lies_as(stored[own], dtype)
            linkable += size if is_as_stored else 0
            converted += 0 if is_as_stored else size
            body += size if name in in_body else 0
    copies = sum(b not in LINKING_BACKENDS for b in backends) if baked else 0
    source = existing_parent(checkpoint.transformer.resolve())
    links = source.stat().st_dev == existing_parent(out).stat().st_dev
    needed = converted + (0 if links else linkable) + copies * body
    free = disk_free_bytes(out)
    verdict = None
    if needed > free:
        verdict = (
            f"will not fit: {amount(needed)} of disk needed, {amount(free)} free "
            f"where '{out}' would lie"
        )
    return {
        "linked_bytes": linkable if links else 0,
        "converted_bytes": converted + (0 if links else linkable),
        "baked_bytes": copies * body,
        "needed_bytes": needed,
        "free_bytes": free,
        "verdict": verdict,
    }


def _body_weights(cut: Cut) -> set[str]:
    blocks = {s.block for s in cut.stages}
    body = replace(cut, segments=tuple(s for s in cut.segments if s.name in blocks))
    return set(body.weights())


def render_plan(planned: Mapping[str, Any]) -> list[str]:
    """Turn what ``build --dry-run`` found into lines for people."""
    forecast = planned["forecast"]
    disk = forecast["disk"]
    lines = [f"{n}: {v}" for n, v in planned.items() if n not in ("forecast", "notes")]
    lines += planned["notes"]
    lines.append(
        f"disk: {amount(disk['needed_bytes'])} written beside "
        f"{amount(disk['linked_bytes'])} linked, {amount(disk['free_bytes'])} free"
    )
    lines += ["", *render_forecast(forecast)]
    return lines if disk["verdict"] is None else [*lines, disk["verdict"]]
