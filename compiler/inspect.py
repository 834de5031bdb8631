# SPDX-License-Identifier: Apache-2.0
"""Tell what a bundle holds, and what a run of it will need and save, without running it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from ..bundle.files import disk_use
from ..bundle.manifest import EngineSetEntry, Manifest
from ..bundle.reader import MANIFEST, Bundle
from ..core.errors import RequestError, nearest
from ..engines import backend_class
from ..engines.record import EngineRecord
from .cut.declared import Cut
from .cut.document import cut_of
from .engine_layers import ENGINE_COLUMNS, LAYER_COLUMNS, attention_of, engine_rows, layer_rows
from .forecast.footprint import amount
from .forecast.run import forecast_run, render_forecast
from .forecast.speedup import predict, timestep_tables, timesteps_of
from .forecast.tables import draw_table
from .sizes import bundle_pipeline, size_of

__all__ = ["inspect_bundle", "render"]

AHEAD = ("text_encoder", "shape", "prompt", "prompt_block", "run", "run_block")
"""When graphs run that no step runs."""


def inspect_bundle(
    bundle: Bundle,
    *,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    steps: int | None = None,
    engine: str | None = None,
    offload: bool = False,
) -> dict[str, Any]:
    """Describe a bundle and forecast a run at a size.

    Args:
        bundle: An open bundle.
        height: Pixels; None takes the default config's, here and below.
        width: Pixels.
        frames: Frames of the video.
        steps: Denoise steps.
        engine: Graph whose engines' layers `render` lists one by one.
        offload: As `forecast_memory` takes it.

    Returns:
        Plain data, as ``inspect --json`` prints it. Every size is in bytes, every count of
        operations in FLOPs of one branch.

    Raises:
        RequestError: a size that VAE or patches do not divide, or an engine that there isn't.
        BundleError: an engine's record or a graph can't be read.
    """
    manifest, cut = bundle.manifest, cut_of(bundle)
    if engine is not None and engine not in manifest.graphs:
        hint = nearest(engine, list(manifest.graphs))
        raise RequestError(f"engine '{engine}'", "is not in the bundle", hint)
    generation = manifest.configs[manifest.default_config].generation
    size = size_of(generation, height=height, width=width, frames=frames, steps=steps)
    forecast = forecast_run(
        manifest,
        cut,
        size,
        pipeline=bundle_pipeline(bundle),
        backend=manifest.engines[0].backend,
        offload=offload,
    )
    total, own = disk_use(bundle.folder, [*manifest.files, MANIFEST])
    return {
        "bundle": str(bundle.folder),
        "family": manifest.family,
        "freewheel_version": manifest.freewheel_version,
        "checkpoint": manifest.checkpoint.model_dump(exclude={"config"}),
        "precision": manifest.precision,
        "weights": manifest.weights,
        "blocks": manifest.block_count,
        "default_config": manifest.default_config,
        "graphs": {name: describe_graph(bundle, name) for name in manifest.graphs},
        "tensors": describe_tensors(bundle),
        "engines": [describe_engines(bundle, entry) for entry in manifest.engines],
        "engine": engine,
        "disk": {"bytes": total, "own_bytes": own, "linked_bytes": total - own},
        **forecast,
        "speedup": _speedups(bundle, cut, forecast["dims"], steps),
    }


def describe_graph(bundle: Bundle, name: str) -> dict[str, Any]:
    """Describe one graph: when it runs, its interface, and how many nodes of which operator."""
    entry = bundle.manifest.graphs[name]
    operators = Counter(node.op_type for node in ir.load(bundle.graph_path(name)).graph.all_nodes())
    return {
        "runs": entry.runs,
        "precision": entry.precision,
        "nodes": sum(operators.values()),
        "operators": dict(operators.most_common()),
        "inputs": {n: e.model_dump() for n, e in entry.inputs.items()},
        "outputs": {n: e.model_dump() for n, e in entry.outputs.items()},
        "weights": len(entry.weights),
    }


def describe_tensors(bundle: Bundle) -> dict[str, Any]:
    """Sum the weights up by dtype, by whether their file is shared, and those that no step reads."""
    tensors = bundle.manifest.tensors
    by_dtype: Counter[str] = Counter()
    by_origin: Counter[str] = Counter()
    files = {t.file for t in tensors.values()}
    linked = {f for f in files if bundle.path(f).stat().st_nlink > 1}
    for tensor in tensors.values():
        by_dtype[tensor.dtype] += tensor.bytes
        by_origin["linked" if tensor.file in linked else "converted"] += tensor.bytes
    return {
        "count": len(tensors),
        "bytes": sum(by_dtype.values()),
        "bytes_by_dtype": dict(by_dtype),
        "linked_bytes": by_origin["linked"],
        "converted_bytes": by_origin["converted"],
        "ahead_bytes": sum(tensors[name].bytes for name in read_ahead(bundle.manifest)),
        "files": sorted(files),
    }


def read_ahead(manifest: Manifest) -> set[str]:
    """Return the weights that graphs read before the first step and none reads at a step."""
    ahead: set[str] = set()
    later: set[str] = set()
    prefixes = [expert.prefix for expert in manifest.experts] or [""]
    for name, graph in manifest.graphs.items():
        stages = [
            s for s in manifest.stages if name in (s.block, s.context, s.modulation, s.tapped)
        ]
        blocks = {b for s in stages for b in range(s.first, s.first + s.count)} or {0}
        weights = {
            prefix + pattern.replace("{block}", str(block))
            for pattern in graph.weights.values()
            for prefix in prefixes
            for block in blocks
        }
        if graph.runs in AHEAD:
            ahead |= weights
        else:
            later |= weights
    return (ahead - later) & manifest.tensors.keys()


def describe_engines(bundle: Bundle, entry: EngineSetEntry) -> dict[str, Any]:
    """Describe the engines of one backend, with what each recorded about itself.

    Raises:
        BundleError: an engine's record can't be read.
    """
    graphs = {}
    for graph, file in entry.files.items():
        record = EngineRecord.read(bundle.path(file))
        graphs[graph] = {
            "seconds": entry.seconds.get(graph),
            "bytes": sum(record.files.values()),
            "precision": record.precision,
            "version": record.version,
            "machine": record.machine,
            "layers": len(record.details.get("layers", ())),
            "attention": attention_of(record.details),
            "details": dict(record.details),
        }
    available = backend_class(entry.backend).probe()
    return {
        "backend": entry.backend,
        "target": entry.target,
        "available": available.available,
        "reason": available.reason,
        "seconds": round(sum(entry.seconds.values()), 3),
        "bytes": sum(g["bytes"] for g in graphs.values()),
        "graphs": graphs,
    }


def render(data: Mapping[str, Any]) -> list[str]:
    """Turn what `inspect_bundle` found into lines for people."""
    origin, disk, tensors = data["checkpoint"], data["disk"], data["tensors"]
    by_dtype = ", ".join(f"{amount(b)} {d}" for d, b in tensors["bytes_by_dtype"].items())
    head = [
        f"{data['bundle']}: {data['family']}, {data['blocks']} blocks, body {data['precision']}, "
        f"weights {data['weights']}, built by Freewheel {data['freewheel_version']}",
        f"from {origin['source']} ({origin['transformer_class']})",
        f"{amount(disk['bytes'])} on disk, {amount(disk['linked_bytes'])} of it linked to the "
        f"checkpoint; {tensors['count']} tensors: {by_dtype}",
        f"{amount(tensors['ahead_bytes'])} of these ({tensors['ahead_bytes'] / tensors['bytes']:.1%}) "
        "no step reads: what is made of them is made once per prompt or run",
    ]
    graphs = [
        [name, g["runs"], g["precision"], g["nodes"], _top(g["operators"]), g["weights"]]
        for name, g in data["graphs"].items()
    ]
    lines = [*head, ""]
    lines += draw_table(
        "graphs", ["graph", "runs", "precision", "nodes", "operators", "weights"], graphs
    )
    for engines in data["engines"]:
        note = "" if engines["available"] else f", can't run here: {engines['reason']}"
        lines += [
            f"engines: {engines['backend']} for {engines['target']}, {amount(engines['bytes'])}, "
            f"compiled in {engines['seconds']} s{note}"
        ]
        lines += _render_layers(engines, data["engine"])
    return [*lines, "", *render_forecast(data), *_render_speedups(data)]


def _render_layers(engines: Mapping[str, Any], chosen: str | None) -> list[str]:
    """Draw what a builder made of each graph, where it tells; and the layers of one of them."""
    graphs = engines["graphs"]
    rows = engine_rows(graphs, amount)
    lines = ["", *draw_table("what the builder made", ENGINE_COLUMNS, rows)] if rows else []
    if chosen in graphs and graphs[chosen]["attention"] is not None:
        title = f"layers of '{chosen}' for {engines['backend']}"
        lines += draw_table(title, LAYER_COLUMNS, layer_rows(graphs[chosen]["details"]))
    return lines


def _render_speedups(data: Mapping[str, Any]) -> list[str]:
    rows = [
        [
            name,
            p["policy"],
            p["reason"] or f"{p['computed_steps']} of {p['steps']}",
            *("–" if p[k] is None else f"{p[k]:.2f}" for k in ("ideal_speedup", "flops_speedup")),
        ]
        for name, p in data["speedup"].items()
    ]
    columns = ["setting", "policy", "computed steps", "ideal speedup", "by FLOPs"]
    return draw_table("predicted before any run", columns, rows)


def _speedups(
    bundle: Bundle,
    cut: Cut,
    dims: Mapping[str, int],
    steps: int | None,
) -> dict[str, Any]:
    """Predict each setting: a config on its own schedule, a policy on the default config's.

    Steps that were asked for hold for all.
    """
    manifest = bundle.manifest
    default = manifest.configs[manifest.default_config].generation
    tables: dict[tuple[int, float], dict[str, Any]] = {}
    found = {}
    for name, setting in manifest.settings.items():
        carried = manifest.configs.get(name)
        generation = default if carried is None else carried.generation
        key = (size_of(generation, steps=steps).steps, generation.flow_shift)
        if key not in tables:
            tables[key] = timestep_tables(bundle, cut, timesteps_of(bundle, generation, key[0]))
        found[name] = predict(cut, dims, setting, tables[key]).as_dict()
    return found


def _top(operators: Mapping[str, int]) -> str:
    shown = [f"{n} {op}" for op, n in list(operators.items())[:4]]
    return ", ".join(shown) + (" …" if len(operators) > 4 else "")
