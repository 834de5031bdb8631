# SPDX-License-Identifier: Apache-2.0
"""Seconds of a computed step of several models at their real width, beside diffusers eager and torch.compile.

    python benchmarks/width.py --out out/bench
    python benchmarks/width.py --models flux_2,ltx_2 --precisions bfloat16

Published configs cut to two blocks, one of each kind where there are several, with random weights. Everything
runs in turn in one process, round by round; figures are medians. Eager and engines read the same
mapped file, so that weights are in memory once. Beside the seconds stands the rate of a form: operations of
eager's matrix products and attention, by seconds; and the rate of a bare product with the model's
largest matrix, which tells how much is left to gain.
"""

from __future__ import annotations

import gc
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import diffusers
import torch
import typer
from page import OUT, Out, Table, write
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from freewheel.bundle.reader import Bundle
from freewheel.compiler.build import build
from freewheel.compiler.cut.arguments import leaves_of
from freewheel.compiler.cut.models import row_of
from freewheel.compiler.cut.prove import eager, random_inputs, random_weights, relative_error
from freewheel.compiler.cut.row import SIZES, Row
from freewheel.compiler.plan import plan
from freewheel.compiler.request import BuildRequest
from freewheel.configs.load import load_config
from freewheel.engines import backend
from freewheel.runtime.model import Model
from freewheel.runtime.session import Session
from freewheel.runtime.settings import config_entry

TWO = {"num_layers": 2}
MODELS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "wan2.1-1.3b": ("WanTransformer3DModel", {**TWO, "num_attention_heads": 12, "ffn_dim": 8960}),
    "wan2.1-14b": ("WanTransformer3DModel", TWO),
    "qwen_image": ("QwenImageTransformer2DModel", TWO),
    "flux_2": ("Flux2Transformer2DModel", {"num_layers": 1, "num_single_layers": 1}),
    "hunyuan_video_15": ("HunyuanVideo15Transformer3DModel", TWO),
    "ltx_2": ("LTX2VideoTransformer3DModel", TWO),
}
"""Name → diffusers' class, whose defaults are the published config, and what is not the default."""

LOW_TIMESTEPS = {"HunyuanVideo15Transformer3DModel"}
"""Classes whose pipelines cast timesteps to the transformer's dtype; the others take float32."""

PRODUCTS = 9
"""Bare products whose median is a rate."""


def checkpoint_of(name: str, folder: Path, dtype: torch.dtype) -> tuple[Row, Path]:
    """Write a model's weights; return its row and folder."""
    class_name, changed = MODELS[name]
    row = row_of(class_name)
    assert row is not None, f"{class_name} is in the table"
    with torch.device("meta"):
        model = getattr(diffusers, class_name)(**changed).to(dtype)
    random_weights(model.to_empty(device="cpu")).save_pretrained(folder / name)
    return row, folder / name


def session_of(checkpoint: Path, out: Path, engines: str, precision: str) -> Session:
    """Build a bundle and open a session on it."""
    request = BuildRequest(
        model=str(checkpoint),
        out=out,
        backends=[backend(engines)],
        precision=precision,  # type: ignore[arg-type]  # a name of PRECISIONS
        configs={"off": config_entry(load_config("off"))},
    )
    build(plan(request))
    return Session(Model(Bundle(out)))


def ours(session: Session, raw: Mapping[str, Any]) -> Callable[[], Tensor]:
    """Return what runs one step of a session on a row's inputs."""
    declared = session.manifest.inputs
    given = {name: raw[entry.argument] for name, entry in declared.items()}
    given = {n: torch.arange(v).float() if isinstance(v, int) else v for n, v in given.items()}
    timesteps = {
        of: (value * entry.scale + entry.offset).reshape(1)
        for name, entry in declared.items()
        if entry.runs == "run"
        for of, value in zip(entry.of, given[name], strict=False)
    }
    behind, first = timesteps.pop("next", torch.zeros(0)), timesteps.pop("latents")
    session.set_prompt("cond", {n: given[n] for n, e in declared.items() if e.runs == "prompt"})
    latents = {name: given[name] for name in session.manifest.latents}

    def call() -> Tensor:
        session.begin(torch.cat([first, behind]), beside=timesteps)
        return session.step("cond", 0, latents)

    return call


def theirs(row: Row, model: nn.Module, raw: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """Return what runs a diffusers transformer on the same inputs, as its pipeline casts them."""
    declared = leaves_of(row, model.config)[1]
    kept = {n for n, entry in declared.items() if entry.changes == "run"}
    if row.model in LOW_TIMESTEPS:
        kept = set()
    cast = {
        n: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() and n not in kept else v
        for n, v in raw.items()
    }
    return lambda: eager(row, model, cast)[0]


def product_rate(matrix: Tensor, rows: int) -> float:
    """Return the GFLOP/s of PyTorch's product of ``rows`` vectors with a matrix."""
    vectors = torch.randn(rows, matrix.shape[1]).to(matrix)
    taken = []
    for _ in range(PRODUCTS):
        began = time.perf_counter()
        nn.functional.linear(vectors, matrix)
        taken.append(time.perf_counter() - began)
    return 2 * rows * matrix.numel() / statistics.median(taken) / 1e9


def measure(
    name: str, precision: str, counts: Mapping[str, int], rounds: int, *, compiled: bool
) -> list[dict[str, Any]]:
    """Measure one model at one precision; return a row per form."""
    dtype = getattr(torch, precision)
    with tempfile.TemporaryDirectory(dir=OUT) as scratch:
        row, checkpoint = checkpoint_of(name, Path(scratch), dtype)
        model_class = getattr(diffusers, row.model)
        model = model_class.from_pretrained(checkpoint, dtype=dtype).eval()
        raw = random_inputs(row, model.config, {**row.sizes(model.config, {**SIZES, **counts})})
        forms: dict[str, Callable[[], Tensor]] = {"diffusers eager": theirs(row, model, raw, dtype)}
        if compiled:
            forms["torch.compile"] = theirs(row, torch.compile(model), raw, dtype)
        engines = ("openvino", "onnxruntime") if precision == "float32" else ("openvino",)
        for one in engines:
            session = session_of(checkpoint, Path(scratch) / one, one, precision)
            forms[f"freewheel {one}"] = ours(session, raw)
        seconds: dict[str, list[float]] = {form: [] for form in forms}
        outputs: dict[str, Tensor] = {}
        for round_ in range(rounds + 1):  # the first one warms up
            for form, call in forms.items():
                began = time.perf_counter()
                outputs[form] = call().float().clone()
                taken = time.perf_counter() - began
                typer.echo(f"{name}, {precision}, round {round_}: {form} {taken:.2f} s", err=True)
                if round_:
                    seconds[form].append(taken)
        counter = FlopCounterMode(display=False)
        with counter:
            forms["diffusers eager"]()
        operations = counter.get_total_flops() / 1e9
        largest = max((w for w in model.parameters() if w.ndim == 2), key=Tensor.numel)
        product = product_rate(largest.detach(), counts["tokens"])
        base = seconds["diffusers eager"]
        found = [
            {
                "model": name,
                "precision": precision,
                "form": form,
                "seconds": statistics.median(taken),
                "speedup": statistics.median(b / t for b, t in zip(base, taken, strict=True)),
                "gflops": operations / statistics.median(taken),
                "product_gflops": product,
                "apart": relative_error(outputs[form], outputs["diffusers eager"]),
            }
            for form, taken in seconds.items()
        ]
        del forms, model, outputs
        gc.collect()
        torch.compiler.reset()
        shutil.rmtree(scratch, ignore_errors=True)
    return found


def main(
    out: Out = OUT,
    models: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(MODELS),
    precisions: Annotated[str, typer.Option(help="Comma-separated.")] = "float32,bfloat16",
    height: Annotated[int, typer.Option(help="Patches.")] = 20,
    width: Annotated[int, typer.Option(help="Patches.")] = 24,
    text_tokens: Annotated[int, typer.Option(help="Of the prompt.")] = 128,
    rounds: Annotated[int, typer.Option(help="Rounds counted.")] = 3,
    compiled: Annotated[bool, typer.Option(help="Also torch.compile.")] = True,
) -> None:
    """Measure steps of several models at their real width."""
    OUT.mkdir(parents=True, exist_ok=True)
    counts = {
        "batch": 1,
        "frames": 1,
        "height": height,
        "width": width,
        "tokens": height * width,
        "text_tokens": text_tokens,
        "text_tokens_2": text_tokens,
        "rows": height,
        "columns": width,
    }
    rows: list[dict[str, Any]] = []
    text = ""
    for name in models.split(","):
        for precision in precisions.split(","):
            rows += measure(name, precision, counts, rounds, compiled=compiled)
            cells = [
                [
                    r["model"],
                    r["precision"],
                    r["form"],
                    r["seconds"],
                    f"{r['speedup']:.2f}×",
                    f"{r['gflops']:.0f}",
                    f"{r['product_gflops']:.0f}",
                    f"{r['apart']:.0e}",
                ]
                for r in rows
            ]
            columns = ["model", "precision", "computed step", "seconds", "over eager"]
            columns += ["GFLOP/s", "of a bare product", "apart"]
            table = Table(columns, cells, f"Two blocks, {height * width} tokens:", texts=3)
            text = write(out, "width", "Steps at real width", {"rows": rows}, table)
    typer.echo(text)


if __name__ == "__main__":
    typer.run(main)
