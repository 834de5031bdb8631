# SPDX-License-Identifier: Apache-2.0
"""What a low-precision body changes: latents and decoded frames against a float32 build.

    python benchmarks/precision.py --out out/bench

The demo model, one prompt per seed, uncached, same noise. On a CPU without bfloat16 instructions
OpenVINO stores and passes bfloat16 and computes in float32; the table names what the CPU has.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from page import OUT, Out, Table, write

from freewheel.bundle.reader import Bundle
from freewheel.compiler.build import build
from freewheel.compiler.plan import plan
from freewheel.compiler.request import BuildRequest
from freewheel.engines import backend
from freewheel.policies.setting import CacheSetting
from freewheel.runtime.pipeline.generate import Generation, Generator
from freewheel.runtime.pipeline.request import GenerationRequest
from freewheel.runtime.settings import config_entries
from freewheel.tuning.quality import compare_videos

MODEL = Path(__file__).resolve().parent.parent / "models" / "shapes_wan"
PROMPTS = (
    "a cyan circle moving down on a brown background",
    "a white square growing on a navy background",
)


def generations(precision: str, folder: Path, steps: int) -> list[Generation]:
    """Build the demo model at ``precision`` and run every prompt uncached."""
    configs = config_entries(["shapes_wan_off"], typer.echo)
    openvino = backend("openvino")
    out = folder / precision
    build(plan(BuildRequest(str(MODEL), out, [openvino], configs, precision=precision)))  # type: ignore[arg-type]  # a name of PRECISIONS
    bundle = Bundle(out)
    generator = Generator(bundle)
    defaults = bundle.manifest.configs["shapes_wan_off"].generation
    return [
        generator.generate(
            GenerationRequest(prompt, CacheSetting(), defaults=defaults, steps=steps, seed=seed)
        )
        for seed, prompt in enumerate(PROMPTS)
    ]


def main(
    out: Out = OUT,
    steps: Annotated[int, typer.Option(help="Denoise steps.")] = 20,
    precisions: Annotated[str, typer.Option(help="Comma-separated.")] = "bfloat16,float16",
) -> None:
    """Compare low-precision builds with float32 on the demo model."""
    out.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=out))
    rows: list[dict[str, Any]] = []
    try:
        exact = generations("float32", folder, steps)
        for precision in precisions.split(","):
            found = generations(precision, folder, steps)
            errors = [
                float((a.latents - b.latents).abs().mean() / b.latents.abs().mean())
                for a, b in zip(found, exact, strict=True)
            ]
            psnr = [
                compare_videos(a.frames, b.frames).psnr for a, b in zip(found, exact, strict=True)
            ]
            rows.append({"precision": precision, "latent_error": errors, "psnr": psnr})
    finally:
        shutil.rmtree(folder)
    shown = []
    for row in rows:
        known = [p for p in row["psnr"] if p is not None]
        psnr = f"{np.mean(known):.1f}" if known else "equal"
        shown.append([row["precision"], f"{np.mean(row['latent_error']):.1e}", psnr])
    columns = ["body", "latents, relative L1", "PSNR of frames, dB"]
    table = Table(columns, shown, f"The demo model, {steps} steps, uncached, OpenVINO:")
    typer.echo(write(out, "precision", "Low precision", {"rows": rows}, table))


if __name__ == "__main__":
    typer.run(main)
