# SPDX-License-Identifier: Apache-2.0
"""Build each family's block templates at their real width with TensorRT-RTX, with no GPU needed.

    python benchmarks/family_blocks.py --out out/bench
    python benchmarks/family_blocks.py --families flux,ltx --precision float16

A transformer of the published config, of one layer of each kind, is cut on the meta device: no weight is
made, for the graphs take them as inputs. Each block's engine is built in a process of its own, for
every size up to the largest that the model's authors name.
"""

from __future__ import annotations

import inspect
import json
import multiprocessing
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import diffusers
import torch
import typer
from page import OUT, Out, Table, write
from tensorrt_build import SLOW_IMPORTS, build_engine, call

# Of one refiner block, attention depends on the prompt alone and is no part of the block.
ONE_OF_EACH = {"num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 2}


@dataclass(frozen=True)
class Model:
    """A published model, as its blocks see it.

    Attributes:
        transformer: diffusers class; its defaults are the published config.
        sizes: Height, width and frames that engines serve, as ``build`` takes them.
        text_tokens: Of the longest prompt.
        config: What is not the class's default.
    """

    transformer: str
    sizes: Mapping[str, str]
    text_tokens: int
    config: Mapping[str, Any]


MODELS = {
    "wan": Model(
        "WanTransformer3DModel",
        {"height": "480:480:720", "width": "832:832:1280", "frames": "17:81:81"},
        512,
        {},
    ),
    "ltx": Model(
        "LTXVideoTransformer3DModel",
        {"height": "256:512:704", "width": "256:768:1216", "frames": "9:97:257"},
        256,
        {},
    ),
    "flux": Model(
        "FluxTransformer2DModel",
        {"height": "512:1024:1536", "width": "512:1024:1536", "frames": "1"},
        512,
        {"guidance_embeds": True},
    ),
    "hunyuan": Model(
        "HunyuanVideoTransformer3DModel",
        {"height": "320:544:720", "width": "512:960:1280", "frames": "17:129:129"},
        256,
        {},
    ),
}


def trace(name: str, precision: str, folder: Path) -> dict[str, Any]:
    """Write the block graphs of a model; return file, precision and profile of each."""
    from freewheel.bundle.manifest import ConfigEntry, GenerationDefaults
    from freewheel.compiler.cut.models import family_of
    from freewheel.compiler.cut.transformer import cut_transformer
    from freewheel.compiler.defaults import resolve_configs
    from freewheel.compiler.graphs.write import write_graphs
    from freewheel.compiler.profiles import BuildSizes, dim_ranges, parse_range, profiles_of
    from freewheel.core.progress import Silent
    from freewheel.policies.setting import CacheSetting

    model = MODELS[name]
    transformer = getattr(diffusers, model.transformer)
    known = inspect.signature(transformer.__init__).parameters
    layers = {n: v for n, v in ONE_OF_EACH.items() if n in known}
    with torch.device("meta"):
        config = transformer(**model.config, **layers).config
    row, stored = family_of(model.transformer, name), lambda tensor: precision
    cut = cut_transformer(row, config, precision, stored)  # type: ignore[arg-type]  # a name of theirs
    (folder / "graphs").mkdir(parents=True)
    blocks = {s.block for s in cut.stages}
    segments = [s for s in cut.segments if s.name in blocks]
    graphs = write_graphs(segments, cut.example_dims, folder, Silent())
    defaults = ConfigEntry(
        cache=CacheSetting(), generation=GenerationDefaults(text_tokens=model.text_tokens)
    )
    sizes = BuildSizes(**{n: parse_range(f"--{n}", t) for n, t in model.sizes.items()})
    ranges = dim_ranges(cut, sizes, resolve_configs({"off": defaults}, None, cut), None)
    profiles = profiles_of(graphs, {}, cut, ranges)
    return {
        n: {
            "file": str(folder / g.file),
            "precision": g.precision,
            "profiles": profiles[n],
            "tokens": ranges["tokens"][2],
            "text_tokens": ranges["text_tokens"][2],
        }
        for n, g in graphs.items()
    }


def main(
    families: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(MODELS),
    precision: Annotated[str, typer.Option(help="bfloat16 or float16.")] = "bfloat16",
    capabilities: Annotated[str, typer.Option(help="Comma-separated.")] = "8.9",
    out: Out = OUT,
) -> None:
    """Build every block template of every family and measure each."""
    out.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(SLOW_IMPORTS)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=out) as folder:
        for family in families.split(","):
            for block, entry in trace(family, precision, Path(folder) / family).items():
                target = {
                    "precision": entry["precision"],
                    "profiles": entry["profiles"],
                    "compute_capabilities": tuple(capabilities.split(",")),
                }
                engine = f"{folder}/{family}/engines/{block}"
                built = call(context, build_engine, entry["file"], target, engine)
                sizes = {n: entry[n] for n in ("tokens", "text_tokens")}
                rows.append({"family": family, "block": block, **sizes, **built})
                typer.echo(json.dumps(rows[-1]), err=True)
    data = {"precision": precision, "capabilities": capabilities, "blocks": rows}
    title = "Block templates of each family with TensorRT-RTX"
    typer.echo(write(out, "family_blocks", title, data, table(data)))
    if any("fault" in row for row in rows):
        raise typer.Exit(1)


def table(data: Mapping[str, Any]) -> Table:
    """Return a row per block template."""
    rows = []
    for row in data["blocks"]:
        name = [f"`{row['family']}` {row['block']}", f"{row['tokens']:,} + {row['text_tokens']:,}"]
        if "fault" in row:
            rows.append([*name, row["fault"], None, None, None])
            continue
        scratch = row["activation_bytes"]
        rows.append(
            [
                *name,
                f"{row['seconds']:.1f}",
                f"{row['plan_bytes'] / 1e6:.1f}",
                None if scratch is None else f"{scratch / 1e9:.1f}",
                f"{row['fused_attention']} of {row['attention_nodes']}",
            ]
        )
    columns = [
        "block",
        "largest profile, tokens + text",
        "seconds",
        "plan MB",
        "activations GB",
        "fused attention",
    ]
    text = f"Body {data['precision']}, compute capabilities {data['capabilities']}:"
    return Table(columns, rows, text)


if __name__ == "__main__":
    typer.run(main)
