# SPDX-License-Identifier: Apache-2.0
"""Set a run's forecast memory against what this machine has, and refuse what can't fit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...bundle.manifest import ConfigEntry
from ...bundle.reader import Bundle
from ...core.errors import RequestError
from ...engines.host import gpu_free_bytes, memory_available_bytes
from ...policies.setting import CacheSetting
from ...policies.spec import PolicySpec
from ..cut.declared import Cut
from ..cut.document import cut_of
from ..sizes import Size, branches_of, bundle_pipeline, dims_of
from .footprint import fit_verdict, footprint_of
from .memory_beside import memory_beside, runs_on_host

__all__ = ["check_fit", "forecast_memory", "run_memory"]


def forecast_memory(
    cut: Cut,
    size: Size,
    *,
    setting: str,
    settings: Mapping[str, CacheSetting],
    specs: Mapping[str, PolicySpec],
    pipeline: Path | None,
    backend: str,
    precision: str,
    experts: int = 1,
    gpu: int | None = None,
    offload: bool = False,
) -> dict[str, Any]:
    """Forecast a run's memory where its model runs, and set it against what this machine has left.

    Args:
        cut: The cut model.
        size: What is asked for.
        setting: Of ``settings``, the one that decides whether it fits.
        settings: Cache settings to forecast for, by any name.
        specs: Policy name → declaration.
        pipeline: Folder of the diffusers pipeline; without one its parts are left out.
        backend: Backend that will run it.
        precision: Precision of the body.
        experts: Transformers that share the graphs, each with weights and buffers of its own.
        gpu: Index of the GPU that it runs on; the current one where none is named.
        offload: Whether a GPU leaves block weights and the pipeline's parts in host memory.

    Raises:
        ConfigError: a setting's parameter is unknown or out of range.
        RequestError: a size that VAE or patches do not divide.
    """
    on_host = runs_on_host(backend)
    footprint = footprint_of(
        cut,
        dims_of(cut, size, pipeline),
        branches=branches_of(cut, size),
        settings=settings,
        specs=specs,
        experts=experts,
    )
    parts = {
        **footprint.parts(setting, offload=offload and not on_host),
        **memory_beside(cut, size, pipeline, backend=backend, precision=precision, offload=offload),
    }
    available = memory_available_bytes() if on_host else gpu_free_bytes(gpu)
    verdict = fit_verdict(parts, available, mapped=on_host)
    return {
        **footprint.as_dict(),
        "setting": setting,
        "parts": parts,
        "needed_bytes": sum(parts.values()),
        "device": "host" if on_host else "gpu",
        "available_bytes": available,
        "verdict": None if verdict is None else verdict.text,
        "runs": verdict is None or verdict.runs,
    }


def run_memory(
    bundle: Bundle,
    entry: ConfigEntry,
    size: Size,
    *,
    backend: str | None,
    model: Path | None,
    gpu: int | None = None,
    offload: bool = False,
) -> dict[str, Any]:
    """Forecast the memory of a bundle's run as `forecast_memory` does; arguments as of `check_fit`."""
    manifest = bundle.manifest
    return forecast_memory(
        cut_of(bundle),
        size,
        setting="run",
        settings={"run": entry.cache},
        specs=manifest.specs,
        pipeline=model or bundle_pipeline(bundle),
        backend=backend or manifest.engines[0].backend,
        precision=manifest.precision,
        experts=len(manifest.experts) or 1,
        gpu=gpu,
        offload=offload,
    )


def check_fit(
    bundle: Bundle,
    entry: ConfigEntry,
    size: Size,
    *,
    backend: str | None,
    model: Path | None,
    gpu: int | None = None,
    offload: bool = False,
) -> str | None:
    """Forecast a run's memory before anything of it is allocated.

    Args:
        bundle: An open bundle.
        entry: The cache setting of the run.
        size: What is asked for.
        backend: Name of a backend; None takes the bundle's first.
        model: Diffusers folder with the rest of the pipeline, where the bundle has none.
        gpu: Index of the GPU that it runs on; the current one where none is named.
        offload: Whether a GPU leaves block weights and the pipeline's parts in host memory.

    Returns:
        What to warn of: weights that do not stay in memory. None where all is well.

    Raises:
        RequestError: the run will not fit; says which part decides.
    """
    memory = run_memory(bundle, entry, size, backend=backend, model=model, gpu=gpu, offload=offload)
    if memory["verdict"] is None or memory["runs"]:
        verdict: str | None = memory["verdict"]
        return verdict
    raise RequestError(
        f"run at {size.width}x{size.height}, {size.frames} frames",
        memory["verdict"],
        "ask for fewer frames or a smaller size, "
        + (
            ""
            if offload or memory["device"] == "host"
            else "keep weights in host memory with --offload, "
        )
        + "or pass --force to try all the same",
    )
