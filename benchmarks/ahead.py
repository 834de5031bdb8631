# SPDX-License-Identifier: Apache-2.0
"""Tell what models compute ahead of the steps: weights that no step reads, and operations.

    python benchmarks/ahead.py [--json] [CLASS …]

Each transformer is cut on the meta device at its published geometry: no weight is loaded.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from math import prod
from typing import Any

import diffusers

from freewheel.compiler.cut.cut import cut_model
from freewheel.compiler.cut.describe import describe
from freewheel.compiler.cut.models import family_of
from freewheel.compiler.cut.trace import skeleton
from freewheel.compiler.cut.words import Cut, results, shape_of
from freewheel.compiler.inspect import operations

STEPS = 50
FLOAT32 = 4

MODELS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "FLUX.1 dev": ("FluxTransformer2DModel", {"guidance_embeds": True}),
    "Stable Diffusion 3.5 large": (
        "SD3Transformer2DModel",
        {
            "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432,
            "sample_size": 128, "pos_embed_max_size": 192, "qk_norm": "rms_norm",
        },
    ),
    "Qwen-Image": ("QwenImageTransformer2DModel", {}),
    "HunyuanVideo": ("HunyuanVideoTransformer3DModel", {}),
    "CogView4": ("CogView4Transformer2DModel", {}),
    "FLUX.2": ("Flux2Transformer2DModel", {}),
    "Wan 2.1 14B": ("WanTransformer3DModel", {}),
}  # fmt: skip
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


def main() -> None:
    """Print a Markdown table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=list(MODELS), metavar="MODEL")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = {model: ahead_of(model) for model in options.models}
    if options.json:
        print(json.dumps(found, indent=1))
        return
    print(
        f"| model | weights | of these once per run and block | of a step's FLOPs | tables, {STEPS} steps "
        "| once per prompt and block | of a step's FLOPs |\n|---|--:|--:|--:|--:|--:|--:|"
    )
    for model, one in found.items():
        cells = [model, operations(one["weights"])]
        for runs in ("modulation", "context"):
            part = one["ahead"].get(runs, {})
            cells += [f"{part.get(f'{of}_share', 0):.2%}" for of in ("weights", "flops")]
            if runs == "modulation":
                cells.append(f"{one['table_bytes'] / 1e6:.0f} MB" if part else "")
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
