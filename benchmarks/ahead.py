# SPDX-License-Identifier: Apache-2.0
"""Tell what models compute ahead of the steps: weights that no step reads, and operations.

    python benchmarks/ahead.py

Each transformer is cut on the meta device at its published geometry: no weight is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Annotated, Any

import diffusers
import typer
from page import OUT, Out, Table, write

from freewheel.compiler.cut.cut import cut_model
from freewheel.compiler.cut.describe import describe
from freewheel.compiler.cut.models import family_of
from freewheel.compiler.cut.skeleton import skeleton
from freewheel.compiler.cut.words import Cut, results, shape_of
from freewheel.compiler.forecast.tables import operations

STEPS = 50
FLOAT32 = 4

MODELS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "FLUX.1 dev": ("FluxTransformer2DModel", {"guidance_embeds": True}),
    "Stable Diffusion 3.5 large": (
        "SD3Transformer2DModel",
        {
            "num_layers": 38,
            "num_attention_heads": 38,
            "caption_projection_dim": 2432,
            "sample_size": 128,
            "pos_embed_max_size": 192,
            "qk_norm": "rms_norm",
        },
    ),
    "Qwen-Image": ("QwenImageTransformer2DModel", {}),
    "HunyuanVideo": ("HunyuanVideoTransformer3DModel", {}),
    "CogView4": ("CogView4Transformer2DModel", {}),
    "FLUX.2": ("Flux2Transformer2DModel", {}),
    "Wan 2.1 14B": ("WanTransformer3DModel", {}),
}
"""Model → class, and what of its config is not the class's default."""


def ahead_of(model: str) -> dict[str, Any]:
    """Return weights, shares and table bytes of one model."""
    name, changed = MODELS[model]
    row = family_of(name, "")
    model_class = getattr(diffusers, name)
    config: Any = skeleton(model_class, changed)[0].config
    cut = cut_model(row, model_class, config)
    found = describe(cut, row, config)
    return {
        "weights": sum(s["weights"] for s in found["segments"]),
        "flops": sum(s["flops"] for s in found["segments"]),
        "ahead": found["ahead"],
        "table_bytes": STEPS * FLOAT32 * _table_width(cut),
    }


def _table_width(cut: Cut) -> int:
    """Return the numbers that all blocks' tables have for each step."""
    width = 0
    for call in cut.calls:
        segment = cut.segments[call.segment]
        if segment.runs == "modulation":
            width += sum(prod(shape_of(node)[1:]) for node in results(segment.module))
    return width


def main(
    out: Out = OUT,
    models: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(MODELS),
) -> None:
    """Cut every model and count what runs ahead of its steps."""
    found = {model: ahead_of(model) for model in models.split(",")}
    rows = []
    for model, one in found.items():
        cells = [model, operations(one["weights"])]
        for runs in ("modulation", "context"):
            part = one["ahead"].get(runs)
            cells += [f"{part[f'{of}_share']:.2%}" if part else "" for of in ("weights", "flops")]
            if runs == "modulation":
                cells.append(f"{one['table_bytes'] / 1e6:.0f} MB" if part else "")
        rows.append(cells)
    columns = [
        "model",
        "weights",
        "of these once per run and block",
        "of a step's FLOPs",
        f"tables, {STEPS} steps",
        "once per prompt and block",
        "of a step's FLOPs",
    ]
    typer.echo(
        write(out, "ahead", "Computed ahead of the steps", {"models": found}, Table(columns, rows))
    )


if __name__ == "__main__":
    typer.run(main)
