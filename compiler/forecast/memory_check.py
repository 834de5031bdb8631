# SPDX-License-Identifier: Apache-2.0
"""Set a run's forecast memory against what this machine has, and refuse what can't fit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ...bundle.manifest import ConfigEntry
from ...bundle.reader import Bundle
from ...core.errors import RequestError
from ...engines import backend_class
from ...engines.host import gpu_free_bytes, memory_available_bytes
from ..cut.document import cut_of
from ..sizes import Size, bundle_pipeline, dims_of
from .footprint import Footprint, fit_verdict, footprint_of
from .host_memory import memory_beside

__all__ = ["check_fit", "forecast_memory"]


def forecast_memory(
    footprint: Footprint,
    setting: str,
    *,
    device: str,
    beside: Mapping[str, int],
    gpu: int | None = None,
) -> dict[str, Any]:
    """Set a forecast against the memory that this machine has left.

    Args:
        footprint: The forecast.
        setting: The cache setting that decides whether it fits.
        device: Backend that will run it.
        beside: Part → bytes of what a run on the host needs besides the model.
        gpu: Index of the GPU that it runs on; the current one where none is named.
    """
    # Backends of the CPU say so as a class; the others find their GPU when made.
    is_on_cpu = getattr(backend_class(device), "device", None) == torch.device("cpu")
    available = memory_available_bytes() if is_on_cpu else gpu_free_bytes(gpu)
    parts = {**footprint.parts(setting), **(beside if is_on_cpu else {})}
    verdict = fit_verdict(parts, available, mapped=is_on_cpu)
    return {
        **footprint.as_dict(),
        "setting": setting,
        "parts": parts,
        "needed_bytes": sum(parts.values()),
        "device": "host" if is_on_cpu else "gpu",
        "available_bytes": available,
        "verdict": None if verdict is None else verdict.text,
        "runs": verdict is None or verdict.runs,
    }


def check_fit(
    bundle: Bundle,
    entry: ConfigEntry,
    size: Size,
    *,
    backend: str | None,
    model: Path | None,
    gpu: int | None = None,
) -> str | None:
    """Forecast a run's memory before anything of it is allocated.

    Args:
        bundle: An open bundle.
        entry: The cache setting of the run.
        size: What is asked for.
        backend: Name of a backend; None takes the bundle's first.
        model: Diffusers folder with the rest of the pipeline, where the bundle has none.
        gpu: Index of the GPU that it runs on; the current one where none is named.

    Returns:
        What to warn of: weights that do not stay in memory. None where all is well.

    Raises:
        RequestError: the run will not fit; says which part decides.
    """
    name = backend or bundle.manifest.engines[0].backend
    pipeline = model or bundle_pipeline(bundle)
    cut = cut_of(bundle)
    footprint = footprint_of(
        cut, dims_of(cut, size, pipeline), branches=size.branches, settings={"run": entry.cache},
        specs={n: p.spec for n, p in bundle.manifest.policies.items()},
    )  # fmt: skip
    beside = memory_beside(cut, size, pipeline, backend=name, precision=bundle.manifest.precision)
    memory = forecast_memory(footprint, "run", device=name, beside=beside, gpu=gpu)
    if memory["verdict"] is None or memory["runs"]:
        verdict: str | None = memory["verdict"]
        return verdict
    raise RequestError(
        f"run at {size.width}x{size.height}, {size.frames} frames", memory["verdict"],
        "ask for fewer frames or a smaller size, or pass --force to try all the same",
    )  # fmt: skip
