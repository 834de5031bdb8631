# SPDX-License-Identifier: Apache-2.0
"""Forecast what a run needs: its sizes, its operations and its memory, without running it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...bundle.manifest import PlannedManifest
from ..cut.declared import Cut
from ..sizes import Size, branches_of, dims_of
from .flops import step_flops
from .footprint import amount
from .memory_check import forecast_memory
from .tables import draw_table, operations

__all__ = ["describe_flops", "forecast_run", "render_forecast"]


def forecast_run(
    manifest: PlannedManifest,
    cut: Cut,
    size: Size,
    *,
    pipeline: Path | None,
    backend: str,
    offload: bool = False,
) -> dict[str, Any]:
    """Forecast a run under the default config, and the memory of every policy and config.

    Args:
        manifest: Of a bundle, or of one that is planned.
        cut: Its model, cut.
        size: What is asked for.
        pipeline: Folder of the diffusers pipeline; without one its parts are left out.
        backend: Backend that will run it.
        offload: As `forecast_memory` takes it.

    Returns:
        ``size``, ``dims``, ``flops`` and ``memory``: every size in bytes, every count of operations
        in FLOPs of one branch.

    Raises:
        RequestError: a size that VAE or patches do not divide.
    """
    dims = dims_of(cut, size, pipeline)
    memory = forecast_memory(
        cut,
        size,
        setting=manifest.default_config,
        settings=manifest.settings,
        specs=manifest.specs,
        pipeline=pipeline,
        backend=backend,
        precision=manifest.precision,
        experts=len(manifest.experts) or 1,
        offload=offload,
    )
    return {
        "size": vars(size),
        "dims": dims,
        "flops": describe_flops(cut, dims, size),
        "memory": memory,
    }


def describe_flops(cut: Cut, dims: Mapping[str, int], size: Size) -> dict[str, Any]:
    """Count operations: of each graph once, of a step, and of the uncached run of all branches."""
    flops = step_flops(cut, dims)
    blocks = {s.block: s.count for s in cut.stages}
    return {
        "segments": dict(flops.segments),
        "blocks": blocks,
        "computed_step": flops.computed,
        "reused_step": flops.reused,
        "prompt": flops.prompt,
        "run": flops.run,
        "uncached_run": flops.run
        + branches_of(cut, size) * (size.steps * flops.computed + flops.prompt),
    }


def render_forecast(data: Mapping[str, Any]) -> list[str]:
    """Turn the ``size``, ``flops`` and ``memory`` of a forecast into lines for people."""
    size, dims, flops, memory = data["size"], data["dims"], data["flops"], data["memory"]
    title = (
        f"at {size['width']}x{size['height']}, {size['frames']} frames ({dims['tokens']} tokens), "
        f"{size['steps']} steps, {memory['branches']} {'branch' if memory['branches'] == 1 else 'branches'}"
    )
    per_step = [
        [name, flops["blocks"].get(name, 1), operations(count)]
        for name, count in flops["segments"].items()
        if count
    ]
    per_step += [
        ["computed step", "", operations(flops["computed_step"])],
        ["reused step", "", operations(flops["reused_step"])],
        ["once per prompt", "", operations(flops["prompt"])],
        ["once per run", "", operations(flops["run"])],
        ["uncached run", "", operations(flops["uncached_run"])],
    ]
    caches = [
        [
            name,
            c["slots"],
            amount(c["history_bytes"]),
            amount(c["signal_bytes"]),
            amount(c["feature_bytes"]),
            amount(c["total_bytes"]),
        ]
        for name, c in memory["caches"].items()
    ]
    parts = [[name, amount(b)] for name, b in memory["parts"].items()]
    parts.append(["needed", amount(memory["needed_bytes"])])
    available = memory["available_bytes"]
    parts.append(
        [f"available ({memory['device']})", "unknown" if available is None else amount(available)]
    )
    lines = [title, ""]
    lines += draw_table("operations of one branch", ["graph", "times", "FLOPs"], per_step)
    lines += draw_table(
        "cache of one branch, and memory of the whole run",
        ["setting", "slots", "history", "signals", "features", "run"],
        caches,
    )
    lines += draw_table(f"memory of a run with {memory['setting']}", ["part", "bytes"], parts)
    return lines if memory["verdict"] is None else [*lines, memory["verdict"]]
