# SPDX-License-Identifier: Apache-2.0
"""Measure what weights kept in float8 cost and save against the same weights in bfloat16.

Writes a random transformer of Wan's widths twice, in bfloat16 and in LightX2V's scaled float8, builds
both with a body of bfloat16, and times a computed body of each, in turn. The most memory is that of a
process which runs one of them alone.

    python benchmarks/float8.py --out out/float8
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from memory import MemorySampler
from own_process import call
from safetensors.torch import load_file, save_file
from weights_form import BoundBody, machine

from freewheel.bundle.reader import Bundle
from freewheel.compiler.build import build
from freewheel.compiler.plan import plan
from freewheel.compiler.request import BuildRequest
from freewheel.engines import backend
from freewheel.runtime.settings import config_entries

BACKEND = "openvino"
LARGEST = 448.0  # of float8_e4m3fn
TEXT_TOKENS = 512
LATENT = (1, 60, 104)  # of one frame of 480 × 832: 1,560 tokens
SIZES: Mapping[str, tuple[int, int, int]] = {
    "wan 1.3B, 4 blocks": (12, 8960, 4),
    "wan 14B, 1 block": (40, 13824, 1),
}
"""Name → heads of 128 channels, width of the feed-forward, blocks."""


def write_checkpoints(size: tuple[int, int, int], folder: Path) -> dict[str, Path]:
    """Write one model in both forms; return their folders."""
    heads, width, blocks = size
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=heads, attention_head_dim=128, ffn_dim=width, num_layers=blocks
    )
    places = {form: folder / form for form in ("bfloat16", "float8")}
    for place in places.values():
        model.to(torch.bfloat16).save_pretrained(place, max_shard_size="100GB")  # type: ignore[attr-defined]  # diffusers hides it
    (file,) = places["float8"].glob("*.safetensors")
    state = load_file(file)
    for name, weight in list(state.items()):
        if name.startswith("blocks.") and name.endswith(".weight") and weight.ndim == 2:
            scale = weight.float().abs().amax(dim=1, keepdim=True) / LARGEST
            state[name] = (weight.float() / scale).to(torch.float8_e4m3fn)
            state[f"{name}_scale"] = scale
    save_file(state, file)
    return places


def built(checkpoint: Path, out: Path) -> dict[str, int]:
    """Build a bundle; return its bytes, and those written."""
    report = build(
        plan(BuildRequest(
            model=str(checkpoint), out=out, backends=[backend(BACKEND)], precision="bfloat16",
            configs=config_entries(["off"], lambda text: None),
        ))
    )  # fmt: skip
    tensors = report.manifest.tensors
    blocks = sum(t.bytes for n, t in tensors.items() if n.startswith("blocks."))
    return {"weights": blocks, "written": report.written_bytes}


def peak(folder: Path, queue: Any) -> None:
    """Run the body of a bundle twice; put the most memory into ``queue``, beyond the start's."""
    body = BoundBody(Bundle(folder), BACKEND, LATENT, TEXT_TOKENS)
    sampler = MemorySampler()
    sampler.start()
    body.run()
    body.run()
    sampler.stop()
    found = sampler.peak()
    queue.put({"copied": found.copied, "mapped": found.mapped})


def measure(name: str, rounds: int, folder: Path) -> dict[str, Any]:
    """Build, time and weigh one size in both forms."""
    checkpoints = write_checkpoints(SIZES[name], folder)
    bundles = {form: folder / f"{form}-bundle" for form in checkpoints}
    sizes = {form: built(checkpoints[form], bundles[form]) for form in checkpoints}
    spawn = multiprocessing.get_context("spawn")
    memory = {form: call(spawn, peak, bundles[form]) for form in bundles}
    bodies = {f: BoundBody(Bundle(b), BACKEND, LATENT, TEXT_TOKENS) for f, b in bundles.items()}
    seconds: dict[str, list[float]] = {form: [] for form in bodies}
    for index in range(rounds + 1):
        for form in list(bodies) if index % 2 else list(bodies)[::-1]:
            seconds[form].append(bodies[form].run())
        sys.stderr.write(f"{name}: round {index} of {rounds}\n")
    timed = {form: values[1:] for form, values in seconds.items()}
    ratios = [a / b for a, b in zip(timed["float8"], timed["bfloat16"], strict=True)]
    distance = (bodies["float8"].result - bodies["bfloat16"].result).norm()
    return {
        "size": name,
        "tokens": bodies["float8"].tokens,
        "bytes": sizes,
        "memory": memory,
        "seconds": {form: statistics.median(values) for form, values in timed.items()},
        "ratio": statistics.median(ratios),
        "difference": float(distance / bodies["bfloat16"].result.norm()),
    }


def markdown(rows: list[dict[str, Any]], context: Mapping[str, Any]) -> str:
    """Return the table, with the machine below it."""
    lines = [
        "| size | tokens | form | weights of the blocks, MB | mapped, MB | own memory, MB | body, s | times bfloat16 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        for form in row["seconds"]:
            cells = [
                row["size"], f"{row['tokens']:,}", form, f"{row['bytes'][form]['weights'] / 1e6:.0f}",
                f"{row['memory'][form]['mapped'] / 1e6:.0f}",
                f"{row['memory'][form]['copied'] / 1e6:.0f}", f"{row['seconds'][form]:.3f}",
                f"{row['ratio']:.2f}" if form == "float8" else "1",
            ]  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", ", ".join(f"{k} {v}" for k, v in context.items()) + "."]) + "\n"


def main() -> None:
    """Measure, print the table, write it and the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("out/float8"), help="folder")
    parser.add_argument("--size", choices=list(SIZES), action="append", help="default: all")
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in arguments.size or SIZES:
        with tempfile.TemporaryDirectory(dir=arguments.out) as folder:
            rows.append(measure(name, arguments.rounds, Path(folder)))
    context = machine()
    figures = {"schema_version": 1, "machine": context, "rows": rows}
    (arguments.out / "float8.json").write_text(json.dumps(figures, indent=1) + "\n")
    (arguments.out / "float8.md").write_text(table := markdown(rows, context))
    sys.stdout.write(table)


if __name__ == "__main__":
    main()
