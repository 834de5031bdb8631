# SPDX-License-Identifier: Apache-2.0
"""Compile graphs to engines: each backend's passes, targets and folder, through the store."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType

import onnx
import onnx_ir as ir

from ..bundle.files import sha256_of
from ..bundle.manifest import EngineSetEntry, GraphEntry
from ..bundle.store import NO_STORE, Store
from ..core.errors import BuildError
from ..core.progress import Progress
from ..engines.base import Backend, ProfiledBackend, Target
from ..passes import backend_pipeline, run_passes
from .code_version import code_version
from .profiles import Profile

__all__ = [
    "STORE",
    "compile_graph",
    "compile_graphs",
    "compiled_graphs",
    "complete_target",
    "target_label",
]

STORE = "store"
"""Folder of the store in the build cache."""


def compiled_graphs(graphs: Mapping[str, GraphEntry], weights: str) -> dict[str, GraphEntry]:
    """Return the graphs that have engines: templates of a baked body are carried for reference."""
    return {n: g for n, g in graphs.items() if weights == "inputs" or g.runs != "block"}


def compile_graphs(
    backend: Backend,
    graphs: Mapping[str, GraphEntry],
    folder: Path,
    target: Target,
    progress: Progress,
    *,
    profiles: Mapping[str, Profile] = MappingProxyType({}),
    store: Store = NO_STORE,
) -> EngineSetEntry:
    """Compile every graph for ``backend`` into ``engines/<backend>-<target>``.

    Args:
        backend: Compiles.
        graphs: Graph name → entry.
        folder: The bundle's folder.
        target: Devices and options.
        progress: Advanced once per graph; told the steps of each build where they are known.
        profiles: Graph name → shapes of its inputs, for backends that need them.
        store: Where engines without weights are kept.

    Raises:
        BuildError: the backend refuses a graph; names it.
    """
    label = target_label(target)
    place = f"engines/{backend.name}-{label}"
    (folder / place).mkdir(parents=True, exist_ok=True)
    files, seconds = {}, {}
    for name, graph in graphs.items():
        began = time.perf_counter()
        out = f"{place}/{name}"
        if isinstance(backend, ProfiledBackend):
            backend.progress = partial(_report, progress, name)
        own = replace(target, precision=graph.precision, profiles=profiles.get(name, {}))
        try:
            compile_graph(backend, folder / graph.file, own, folder / out, store)
        except BuildError as error:
            # The staging path means nothing to users; name the graph.
            where = error.where.removeprefix(str((folder / graph.file).parent)).lstrip("/")
            raise BuildError(f"graph '{name}', {where}", error.what, error.hint) from error
        files[name], seconds[name] = out, round(time.perf_counter() - began, 3)
        progress.advance(name)
    return EngineSetEntry(backend=backend.name, target=label, files=files, seconds=seconds)


def compile_graph(
    backend: Backend, graph: Path, target: Target, out: Path, store: Store = NO_STORE
) -> None:
    """Compile one portable graph, after the passes that its backend needs.

    Compiling a graph twice does not give the same bytes (TensorRT-RTX 1.7 numbers its dynamic
    dimensions in no fixed order), so equal graphs of two bundles get one engine from ``store``.
    A graph that reads weights from a file is compiled each time.
    """
    passes = backend_pipeline(backend.name)
    model, changed = run_passes(ir.load(graph), passes) if passes else (None, [])
    if model is not None and changed:
        # Kept: a runtime without our passes compiles it again where the engine does not fit.
        graph = graph.with_name(f"{graph.stem}.{backend.name}.onnx")
        ir.save(model, graph)
    tensors = onnx.load(graph, load_external_data=False).graph.initializer
    has_weights = any(t.data_location == onnx.TensorProto.EXTERNAL for t in tensors)
    about = [
        "engine",
        code_version(),
        backend.name,
        backend.compiler_version(),
        target,
        sha256_of(graph),
    ]
    keeping = NO_STORE if has_weights else store
    keeping.bring(about, out, lambda place: backend.compile(graph, target, place))


def complete_target(backend: Backend, target: Target, cache: Path | None = None) -> Target:
    """Return what ``backend`` compiles for: devices and options concern those that are told them.

    Args:
        backend: Compiles.
        target: Devices and options that are asked for.
        cache: Folder in which such a backend keeps what saves time in the next build.

    Raises:
        BuildError: there is no such device or option.
    """
    if not isinstance(backend, ProfiledBackend):
        return Target()
    backend.cache_folder = cache
    return backend.complete(target)


def target_label(target: Target) -> str:
    """Name what engines are compiled for, for a folder's name."""
    if target.compute_capabilities:
        return "sm" + "-".join(c.replace(".", "") for c in target.compute_capabilities)
    return platform.machine().lower()


def _report(progress: Progress, graph: str, phase: str, done: int, total: int) -> None:
    progress.advance(f"{graph}: {phase.lower()} {done}/{total}", 0)
