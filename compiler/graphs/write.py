# SPDX-License-Identifier: Apache-2.0
"""Turn a cut model into ONNX files and manifest entries."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import onnx_ir as ir

from ...bundle.manifest import GraphEntry, IoEntry
from ...bundle.store import NO_STORE, Store
from ...core.progress import Progress
from ...engines.base import TensorSpec
from ...passes import run_passes, template_pipeline
from ..code_version import code_version
from ..cut.declared import Cut, Segment
from .export import trace

__all__ = ["io_entries", "wanted_weights", "write_graphs"]


def write_graphs(
    segments: Iterable[Segment],
    example_dims: Mapping[str, int],
    bundle: Path,
    progress: Progress,
    dump: Path | None = None,
    *,
    store: Store = NO_STORE,
    made_from: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, GraphEntry]:
    """Trace every segment, run the passes, and write ``graphs/<name>.onnx``.

    Args:
        segments: What to trace; segments that share a module are traced once.
        example_dims: Sizes to trace with.
        bundle: The bundle's folder.
        progress: Advanced once per segment.
        dump: Folder that gets each graph as text after each pass, or None.
        store: Where graphs are kept; with ``dump`` each is traced, for its passes to be seen.
        made_from: What the segments' modules were made from besides what they declare.

    Returns:
        Graph name → manifest entry.
    """
    traced: dict[int, ir.Model] = {}
    entries = {}

    def write(
        segment: Segment, weights: list[str], kept: Mapping[str, TensorSpec], out: Path
    ) -> None:
        key = id(segment.module)
        if key not in traced:
            traced[key] = trace(segment, example_dims)
        pipeline = template_pipeline(weights, segment.inputs, kept)
        model, _ = run_passes(
            traced[key].clone(), pipeline, dump / segment.name if dump is not None else None
        )
        model.graph.name = segment.name
        ir.save(model, out)

    for segment in segments:
        file = f"graphs/{segment.name}.onnx"
        kept = {n: s for n, s in segment.outputs.items() if n not in segment.dropped}
        weights = [name for name, _ in segment.module.named_parameters()]
        about = [
            "graph",
            code_version(),
            dict(made_from),
            dict(example_dims),
            segment.name,
            list(segment.inputs.items()),
            list(kept.items()),
            list(segment.outputs),
            [(n, str(p.dtype), list(p.shape)) for n, p in segment.module.named_parameters()],
        ]
        keeping = store if dump is None else NO_STORE
        keeping.bring(about, bundle / file, partial(write, segment, weights, kept))
        present = [str(v.name) for v in ir.load(bundle / file).graph.inputs]
        entries[segment.name] = GraphEntry(
            file=file,
            runs=segment.runs,
            precision=segment.precision,
            inputs=io_entries({n: s for n, s in segment.inputs.items() if n in present}),
            outputs=io_entries(kept),
            weights={w: segment.prefix + w for w in weights if w in present},
        )
        progress.advance(segment.name)
    return entries


def io_entries(specs: Mapping[str, TensorSpec]) -> dict[str, IoEntry]:
    """Spell tensor specs as the manifest does."""
    return {n: IoEntry(dtype=s.dtype, shape=list(s.shape)) for n, s in specs.items()}


def wanted_weights(
    cut: Cut, graphs: Mapping[str, GraphEntry]
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """List every checkpoint tensor that the graphs take, with the dtype they take it in."""
    wanted = {}
    for segment in cut.segments:
        parameters = dict(segment.module.named_parameters())
        for name, pattern in graphs[segment.name].weights.items():
            dtype = str(parameters[name].dtype).removeprefix("torch.")
            shape = tuple(parameters[name].shape)
            for index in cut.blocks_of(segment.name):
                wanted[pattern.replace("{block}", str(index))] = (dtype, shape)
    return wanted
