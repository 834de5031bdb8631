# SPDX-License-Identifier: Apache-2.0
"""Seconds, size and peak memory of every TensorRT-RTX engine of a model, with no GPU needed.

    python benchmarks/tensorrt_build.py wan2.1-t2v-1.3b --precision bfloat16
    python benchmarks/tensorrt_build.py wan2.1-i2v-14b-480p --graphs block,body_0_0 --layers 1
    python benchmarks/tensorrt_build.py models/shapes_wan --height 64:96:128 --width 96:160:160

A checkpoint, of random weights where a geometry is named, is traced, with its blocks also as one
group with their weights inside. Each engine is then built in a process of its own, whose peak
resident memory is read at its end.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from own_process import call
from page import OUT, Out, Table, write
from synthetic import GEOMETRIES, write_checkpoint

COLUMNS = (
    "graph",
    "nodes",
    "layers",
    "attention fused",
    "seconds",
    "plan MB",
    "peak MB",
    "activations MB",
)
SLOW_IMPORTS = ["torch", "freewheel.compiler.build", "freewheel.engines.tensorrt", "tensorrt_rtx"]


def trace(checkpoint: str, out: str, precision: str, sizes: dict[str, str], queue: Any) -> None:
    """Write a bundle without engines, and every graph's profiles into ``queue``."""
    from freewheel.compiler.build import build
    from freewheel.compiler.cut.document import CUT, read_cut
    from freewheel.compiler.plan import plan
    from freewheel.compiler.profiles import BuildSizes, dim_ranges, parse_range, profiles_of
    from freewheel.compiler.request import BuildRequest
    from freewheel.runtime.settings import config_entries

    configs = config_entries(["off"], typer.echo)
    request = BuildRequest(
        model=checkpoint,
        out=Path(out),
        backends=[],
        configs=configs,
        weights="baked",
        precision=precision,  # type: ignore[arg-type]  # a name of theirs
    )
    began = time.perf_counter()
    manifest = build(plan(request)).manifest
    seconds = time.perf_counter() - began
    cut = read_cut(Path(out) / CUT)
    asked = BuildSizes(**{n: parse_range(f"--{n}", t) for n, t in sizes.items()})
    ranges = dim_ranges(cut, asked, manifest.configs, None)
    graphs = {n: (g.file, g.precision) for n, g in manifest.graphs.items()}
    queue.put(
        (graphs, profiles_of(manifest.graphs, manifest.policies, cut, ranges), ranges, seconds)
    )


def build_engine(graph: str, target: dict[str, Any], out: str, queue: Any) -> None:
    """Build one engine and put what it took into ``queue``."""
    from freewheel.compiler.engines import compile_graph
    from freewheel.engines import Target, backend

    # The server that this process was forked from has imported everything.
    imported = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    began = time.perf_counter()
    try:
        compile_graph(
            backend("tensorrt-rtx", to_build=True), Path(graph), Target(**target), Path(out)
        )
    except Exception as fault:
        queue.put({"fault": str(fault)})
        return
    seconds = time.perf_counter() - began
    details = json.loads((Path(out) / "engine.json").read_text())["details"]
    layers = details["layers"]
    queue.put(
        {
            "seconds": seconds,
            "plan_bytes": (Path(out) / "model.plan").stat().st_size,
            "imported_bytes": imported,
            "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10,
            "activation_bytes": details["activation_bytes"],
            "nodes": sum(details["nodes"].values()),
            "attention_nodes": details["nodes"].get("Attention", 0),
            "layers": len(layers),
            "fused_attention": sum("mha" in layer["kernel"] for layer in layers),
        }
    )


def main(
    model: Annotated[str, typer.Argument(help=f"A folder, or {', '.join(GEOMETRIES)}.")],
    precision: Annotated[str, typer.Option(help="Precision of the body.")] = "bfloat16",
    layers: Annotated[int, typer.Option(help="Blocks of a named geometry, one baked group.")] = 2,
    height: Annotated[str, typer.Option(help="A size or min:opt:max, as below.")] = "480",
    width: Annotated[str, typer.Option(help="Pixels.")] = "832",
    frames: Annotated[str, typer.Option(help="Frames.")] = "17:81:81",
    capabilities: Annotated[str, typer.Option(help="Comma-separated.")] = "8.0,8.9,12.0",
    graphs: Annotated[str, typer.Option(help="Comma-separated; default: all.")] = "",
    out: Out = OUT,
) -> None:
    """Build every engine of one model and measure each."""
    out.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(SLOW_IMPORTS)
    sizes = {"height": height, "width": width, "frames": frames}
    with tempfile.TemporaryDirectory(dir=out) as name:
        folder = Path(name)
        checkpoint, bundle = Path(model), folder / "bundle"
        if model in GEOMETRIES:
            checkpoint = folder / "model"
            write_checkpoint(model, checkpoint, layers, precision)
        found, profiles, ranges, traced = call(
            context, trace, str(checkpoint), str(bundle), precision, sizes
        )
        rows = {}
        for graph in graphs.split(",") if graphs else found:
            file, own = found[graph]
            target = {
                "precision": own,
                "profiles": profiles[graph],
                "compute_capabilities": tuple(capabilities.split(",")),
            }
            arguments = (str(bundle / file), target, str(folder / "engines" / graph))
            try:
                rows[graph] = call(context, build_engine, *arguments)
            except ChildProcessError as fault:
                rows[graph] = {"fault": str(fault)}
            typer.echo(f"{graph}: {json.dumps(rows[graph])}", err=True)
    data = {
        "model": Path(model).name,
        "precision": precision,
        "ranges": ranges,
        "capabilities": capabilities,
        "trace_seconds": traced,
        "engines": rows,
    }
    stem = f"tensorrt_build-{Path(model).name}-{precision}"
    title = f"TensorRT-RTX engines of {data['model']}"
    typer.echo(write(out, stem, title, data, *parts(data)))
    if any("fault" in row for row in rows.values()):
        raise typer.Exit(1)


def parts(data: dict[str, Any]) -> tuple[Table, str]:
    """Return a row per engine, and what the imports take."""
    rows: list[list[Any]] = []
    for name, row in data["engines"].items():
        if "fault" in row:
            rows.append([f"`{name}`", row["fault"], *[None] * 6])
            continue
        scratch = row["activation_bytes"]
        fused = f"{row['fused_attention']} of {row['attention_nodes']}"
        rows.append(
            [
                f"`{name}`",
                row["nodes"],
                row["layers"],
                fused if row["attention_nodes"] else None,
                f"{row['seconds']:.2f}",
                f"{row['plan_bytes'] / 1e6:.2f}",
                f"{row['peak_bytes'] / 1e6:.0f}",
                None if scratch is None else f"{scratch / 1e6:.0f}",
            ]
        )
    built = [row for row in data["engines"].values() if "fault" not in row]
    if not built:
        return Table(COLUMNS, rows), "None was built."
    rows.append(
        [
            "all",
            "",
            "",
            "",
            f"{sum(r['seconds'] for r in built):.1f}",
            f"{sum(r['plan_bytes'] for r in built) / 1e6:.1f}",
            f"{max(r['peak_bytes'] for r in built) / 1e6:.0f}",
            f"{max(r['activation_bytes'] or 0 for r in built) / 1e6:.0f}",
        ]
    )
    text = (
        f"Body {data['precision']}, compute capabilities {data['capabilities']}, tokens "
        f"{'/'.join(map(str, data['ranges']['tokens']))}:"
    )
    imported = max(r["imported_bytes"] for r in built) / 1e6
    return Table(COLUMNS, rows, text), f"{imported:.0f} MB of each peak are what the imports take."


if __name__ == "__main__":
    typer.run(main)
