# SPDX-License-Identifier: Apache-2.0
"""Seconds, peak memory and written bytes of a build, phase by phase, over numbers of layers.

    python benchmarks/build.py --layers 2,10,40 --backends openvino,tensorrt-rtx

Every case builds in a process of its own, whose resident memory is sampled; "copied" leaves out the
pages of mapped files. A checkpoint with random weights is written first, or cut from one that
``--checkpoint`` names.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import shutil
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from memory import MemorySampler
from own_process import call
from page import OUT, Out, Table, write
from synthetic import GEOMETRIES, write_checkpoint


def build_case(
    checkpoint: str, out: str, precision: str, backends: list[str], weights: str, queue: Any
) -> None:
    """Build once in a fresh process and put what it took into ``queue``."""
    from freewheel.compiler.build import build
    from freewheel.compiler.plan import plan
    from freewheel.compiler.request import BuildRequest
    from freewheel.engines import backend
    from freewheel.runtime.settings import config_entries

    imported = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    sampler = MemorySampler()
    sampler.start()
    began, used = time.perf_counter(), time.process_time()
    request = BuildRequest(
        model=checkpoint,
        out=Path(out),
        backends=[backend(b, to_build=True) for b in backends],
        configs=config_entries(["off"], typer.echo),
        precision=precision,
        weights=weights,  # type: ignore[arg-type]  # names of theirs
    )
    planned = plan(request)
    planning = time.perf_counter() - began
    report = build(planned)
    taken, processor = time.perf_counter() - began, time.process_time() - used
    sampler.stop()
    phases = {"plan": round(planning, 3), **report.seconds}
    peaks = sampler.peaks(phases)
    queue.put(
        {
            "seconds": taken,
            "processor_seconds": processor,
            "phase_seconds": phases,
            "phase_peak_bytes": {n: p.resident for n, p in peaks.items()},
            "phase_peak_copied_bytes": {n: p.copied for n, p in peaks.items()},
            "imported_bytes": imported,
            "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10,
            "bundle_bytes": report.bytes,
            "written_bytes": report.written_bytes,
            "graphs": len(report.manifest.graphs),
            "tensors": len(report.manifest.tensors),
        }
    )


def cut_checkpoint(source: Path, out: Path, layers: int) -> None:
    """Give a transformer fewer blocks: hard links to its shards, with another config and index."""
    out.mkdir(parents=True)
    config = json.loads((source / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "num_layers": layers}))
    name = "diffusion_pytorch_model.safetensors.index.json"
    index = json.loads((source / name).read_text())["weight_map"]
    kept = {
        t: f
        for t, f in index.items()
        if not t.startswith("blocks.") or int(t.split(".")[1]) < layers
    }
    (out / name).write_text(json.dumps({"weight_map": kept}))
    for file in set(kept.values()):
        os.link(source / file, out / file)


def measure(
    checkpoint: Path, folder: Path, precision: str, backends: list[str], weights: str
) -> dict[str, Any]:
    """Build ``checkpoint`` in a process of its own; the bundle goes again."""
    context = multiprocessing.get_context("spawn")
    out = folder / "bundle"
    found: dict[str, Any] = call(
        context, build_case, str(checkpoint), str(out), precision, backends, weights
    )
    shutil.rmtree(out)
    return found


def main(
    out: Out = OUT,
    geometry: Annotated[str, typer.Option(help=f"One of {', '.join(GEOMETRIES)}.")] = (
        "wan2.1-i2v-14b-480p"
    ),
    layers: Annotated[str, typer.Option(help="Comma-separated numbers of blocks.")] = "2",
    dtype: Annotated[str, typer.Option(help="Stored dtype of the checkpoint.")] = "bfloat16",
    precision: Annotated[str, typer.Option(help="Precision of the body.")] = "bfloat16",
    backends: Annotated[str, typer.Option(help="Comma-separated.")] = "openvino",
    weights: Annotated[str, typer.Option(help="inputs or baked.")] = "inputs",
    checkpoint: Annotated[
        Path | None, typer.Option(help="Transformer folder to cut, instead of writing one.")
    ] = None,
) -> None:
    """Measure builds of one geometry at several numbers of layers."""
    out.mkdir(parents=True, exist_ok=True)
    # Hard links need one file system.
    folder = Path(tempfile.mkdtemp(dir=checkpoint.parent if checkpoint is not None else out))
    cases = []
    try:
        for count in (int(n) for n in layers.split(",")):
            cut = folder / f"{count}-layers"
            if checkpoint is not None:
                cut_checkpoint(checkpoint, cut, count)
            else:
                write_checkpoint(geometry, cut, count, dtype)
            found = measure(cut, folder, precision, backends.split(","), weights)
            cases.append({"layers": count, **found})
            typer.echo(json.dumps(cases[-1]), err=True)
            shutil.rmtree(cut)
    finally:
        shutil.rmtree(folder)
    data = {
        "geometry": geometry,
        "dtype": dtype,
        "precision": precision,
        "backends": backends,
        "weights": weights,
        "cases": cases,
    }
    typer.echo(write(out, "build", f"Building {geometry}", data, table(data)))


def table(data: dict[str, Any]) -> Table:
    """Return one table: a row per number of layers, seconds and peak memory per phase."""
    phases = list(data["cases"][0]["phase_seconds"])
    rows = [
        [
            case["layers"],
            f"{case['bundle_bytes'] / 1e9:.2f}",
            f"{case['written_bytes'] / 1e6:.1f}",
            *(
                f"{case['phase_seconds'][p]:.1f} ({case['phase_peak_bytes'][p] / 1e6:.0f})"
                for p in phases
            ),
            f"{case['seconds']:.1f}",
            f"{case['processor_seconds']:.1f}",
            f"{case['peak_bytes'] / 1e6:.0f}",
        ]
        for case in data["cases"]
    ]
    columns = ["layers", "bundle GB", "written MB", *phases, "all, s", "processor s", "peak MB"]
    text = (
        f"{data['geometry']}, stored {data['dtype']}, body {data['precision']}, weights "
        f"{data['weights']}, {', '.join(data['backends'])}; seconds, and peak resident MB in brackets:"
    )
    return Table(columns, rows, text, texts=0)


if __name__ == "__main__":
    typer.run(main)
