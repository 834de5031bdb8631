# SPDX-License-Identifier: Apache-2.0
"""Say what a config made for another size than the bundle's own would cost, before it runs."""

from __future__ import annotations

from pathlib import Path

from ...bundle.manifest import ConfigEntry
from ...bundle.reader import Bundle
from ...core.errors import RequestError
from ...runtime.settings import other_size
from ..cut.document import cut_of
from ..sizes import Size, bundle_pipeline, dims_of, size_of
from .footprint import amount
from .memory_check import run_memory
from .run import describe_flops
from .tables import operations

__all__ = ["FAR_BEYOND", "check_geometry"]

FAR_BEYOND = 20
"""Times the operations of the bundle's own run from which a run has to be asked for twice."""


def check_geometry(
    bundle: Bundle,
    name: str,
    entry: ConfigEntry,
    size: Size,
    *,
    force: bool,
    backend: str | None = None,
    model: Path | None = None,
    gpu: int | None = None,
    offload: bool = False,
) -> str | None:
    """Set a run with a config of another size beside the bundle's own run.

    Args:
        bundle: An open bundle.
        name: What the config goes by.
        entry: The config.
        size: What runs: the config's size, and what flags say of it.
        force: Whether to let a run pass that is far beyond the bundle's own.
        backend: As `check_fit` takes it, here and below.
        model: Diffusers folder with the rest of the pipeline, where the bundle has none.
        gpu: Index of the GPU.
        offload: Whether a GPU leaves block weights and the pipeline's parts in host memory.

    Returns:
        What to warn of, with the forecast that `inspect` makes; None where the sizes agree.

    Raises:
        RequestError: the run takes `FAR_BEYOND` times the operations or more, or the size does not
            fit the model.
    """
    manifest = bundle.manifest
    found = other_size(manifest, entry.generation)
    if found is None:
        return None
    own = size_of(manifest.configs[manifest.default_config].generation)
    if (size.height, size.width, size.frames) == (own.height, own.width, own.frames):
        return f"config '{name}' {found}: its thresholds and tables are untried at this size"
    cut, pipeline = cut_of(bundle), model or bundle_pipeline(bundle)
    dims = dims_of(cut, size, pipeline)
    run = describe_flops(cut, dims, size)["uncached_run"]
    usual = describe_flops(cut, dims_of(cut, own, pipeline), own)["uncached_run"]
    memory = run_memory(
        bundle, entry, size, backend=backend, model=model, gpu=gpu, offload=offload
    )["needed_bytes"]
    times = f"{run / usual:.1f}" if run < 10 * usual else f"{run / usual:,.0f}"
    what = (
        f"{found}: {times} times the operations ({operations(run)} FLOPs uncached, "
        f"{operations(usual)} at the bundle's size) and {amount(memory)} of memory"
    )
    if run >= FAR_BEYOND * usual and not force:
        raise RequestError(
            f"config '{name}'",
            what,
            f"run at the bundle's size with --height {own.height} --width {own.width} "
            f"--frames {own.frames}, or pass --force",
        )
    return f"config '{name}' {what}"
