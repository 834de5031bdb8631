# SPDX-License-Identifier: Apache-2.0
"""Add a backend's engines to a bundle that was built where it could not compile.

TensorRT compiles on the GPU that will run. Everything else of a bundle, the traced graphs above all,
is the same wherever it is built, and is left as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..bundle.files import describe_files
from ..bundle.manifest import Manifest
from ..bundle.reader import MANIFEST, Bundle
from ..bundle.staging import alone
from ..bundle.store import Store
from ..core.errors import RequestError
from ..core.output import write_text
from ..core.progress import Progress, Silent
from ..engines import backend_class
from ..engines.base import Backend, ProfiledBackend, Target
from .cut.document import cut_of
from .engines import STORE, compile_graphs, compiled_graphs, complete_target
from .profiles import BuildSizes, dim_ranges, profiles_of

__all__ = ["left_to_gpus", "resume_engines"]

GPU_BACKEND = "tensorrt"
"""The backend that compiles on the GPU alone."""


def left_to_gpus(manifest: Manifest) -> list[str]:
    """Name the graphs that a machine with a GPU will compile; none where one can be here."""
    is_there = backend_class(GPU_BACKEND).probe().can_build
    is_built = any(entry.backend == GPU_BACKEND for entry in manifest.engines)
    return [] if is_there or is_built else list(compiled_graphs(manifest.graphs, manifest.weights))


def resume_engines(
    folder: Path,
    backends: Sequence[Backend],
    target: Target,
    sizes: BuildSizes,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Compile a bundle's graphs for backends that it has no engines of; trace and copy nothing.

    Args:
        folder: A whole bundle. A killed call leaves it whole, and finished engines in ``cache``.
        backends: Compile.
        target: Devices and options of backends that are told them.
        sizes: What their engines are to serve.
        cache: Where they keep what saves time in the next build.
        progress: Told of each engine.

    Returns:
        The manifest as written.

    Raises:
        BundleError: the bundle is damaged.
        RequestError: the bundle has engines of one of the backends, or can't serve the sizes.
        BuildError: a backend refuses a graph.
        OutputError: the bundle can't be written, or another build is at it.
    """
    progress = progress or Silent()
    bundle = Bundle(folder)
    manifest = bundle.manifest
    for backend in backends:
        if bundle.engines(backend.name) is not None:
            raise RequestError(
                f"{folder}, backend '{backend.name}'",
                "has its engines",
                "name another backend, or build anew",
            )
    graphs = compiled_graphs(manifest.graphs, manifest.weights)
    profiles = {}
    if any(isinstance(backend, ProfiledBackend) for backend in backends):
        cut, pipeline = cut_of(bundle), manifest.pipeline.folder
        scale = folder / pipeline if pipeline is not None else None
        ranges = dim_ranges(cut, sizes, manifest.configs, scale)
        profiles = profiles_of(graphs, manifest.policies, cut, ranges, manifest.sequence)
    made = []
    store = Store(cache / STORE if cache is not None else None)
    with alone(folder):
        for backend in backends:
            progress.phase(f"compile for {backend.name}", len(graphs))
            own = complete_target(backend, target, cache)
            made.append(
                compile_graphs(
                    backend, graphs, folder, own, progress, profiles=profiles, store=store
                )
            )
        found = describe_files(folder) if made else {}
        files = {n: e for n, e in found.items() if n not in manifest.files and n != MANIFEST}
        whole = manifest.model_copy(
            update={"engines": [*manifest.engines, *made], "files": {**manifest.files, **files}}
        )
        write_text(folder / MANIFEST, whole.model_dump_json(indent=1), "free some space")
    return whole
