# SPDX-License-Identifier: Apache-2.0
"""Seconds of computed and reused steps at a real width, beside diffusers eager and torch.compile.

    python benchmarks/step.py --out out/bench

Wan 2.1 1.3B geometry cut to a few layers, random weights, 480x832x1 (1,560 tokens). Everything runs
interleaved in one process, round by round; figures are medians. The body is extrapolated to 30
layers by its measured seconds per layer, and said so in the table.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import WanTransformer3DModel
from page import OUT, Out, Table, write
from synthetic import GEOMETRIES, write_checkpoint

from freewheel.bundle.reader import Bundle
from freewheel.compiler.build import build
from freewheel.compiler.plan import plan
from freewheel.compiler.request import BuildRequest
from freewheel.engines import backend
from freewheel.policies.setting import CacheSetting
from freewheel.runtime.model import Model
from freewheel.runtime.session import Session
from freewheel.runtime.settings import config_entries

GEOMETRY = "wan2.1-t2v-1.3b"
FULL_LAYERS = GEOMETRIES[GEOMETRY]["num_layers"]
LATENTS = (1, 16, 1, 60, 104)
TOKENS = 1560
TEXT_TOKENS = 512
STEPS = 8
SETTINGS: dict[str, CacheSetting] = {
    "teacache": CacheSetting(policy="teacache", parameters={"threshold": 1e6}),
    "teacache on modulated_input": CacheSetting(
        policy="teacache", signal="modulated_input", parameters={"threshold": 1e6}
    ),
    "taylorseer order 1": CacheSetting(policy="taylorseer", parameters={"interval": STEPS}),
    "taylorseer order 4": CacheSetting(
        policy="taylorseer", parameters={"interval": STEPS, "order": 4}
    ),
    "adacache": CacheSetting(
        policy="adacache",
        parameters={"codebook_thresholds": [1e6], "codebook_skips": [STEPS]},
    ),
    "custom": CacheSetting(policy="custom", parameters={"threshold": 1e6}),
}


def session_for(
    checkpoint: Path, folder: Path, name: str, precision: str, weights: str = "inputs"
) -> Session:
    """Build a bundle and open a session on it."""
    out = folder / f"{name}-{precision}-{weights}"
    build(
        plan(
            BuildRequest(
                model=str(checkpoint),
                out=out,
                backends=[backend(name)],
                precision=precision,  # type: ignore[arg-type]  # a name of PRECISIONS
                configs=config_entries(["off"], typer.echo),
                weights=weights,  # type: ignore[arg-type]  # inputs or baked
            )
        )
    )
    return Session(Model(Bundle(out)))


def note(line: str) -> None:
    """Tell where the measurement stands; the tables come at the end."""
    typer.echo(line, err=True)


def timed(function: Callable[[], object]) -> float:
    """Return the seconds of one call."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def measure_reuse(engines: str, session: Session, layers: int, rounds: int) -> list[dict[str, Any]]:
    """Measure each policy's computed and reused steps, segment by segment."""
    latents = torch.randn(LATENTS)
    session.set_prompt("cond", {"text_states": torch.randn(1, TEXT_TOKENS, 4096)})
    timesteps = torch.linspace(999, 100, STEPS)
    samples: dict[str, dict[str, list[float]]] = {n: {} for n in SETTINGS}
    for round_ in range(rounds + 1):
        note(f"reuse, {engines}: round {round_} of {rounds}")
        for name, setting in SETTINGS.items():
            session.begin(timesteps, setting)
            session.step("cond", 0, {"latents": latents})
            if name == "adacache":  # its first interval is one step
                session.step("cond", 1, {"latents": latents})
            for step in range(session.last_step("cond") + 1, STEPS):
                session.step("cond", step, {"latents": latents})
            if round_ == 0:
                continue  # warm-up
            branch, kept = session.statistics.branches["cond"], samples[name]
            for computed, seconds in zip(branch.computed, branch.seconds, strict=True):
                kept.setdefault("computed" if computed else "reused", []).append(seconds)
            body = session.statistics.seconds["body"] / branch.computed_steps
            kept.setdefault("body", []).append(body)
    rows = []
    for name, kept in samples.items():
        computed, reused, body = (
            statistics.median(kept[k]) for k in ("computed", "reused", "body")
        )
        full = computed + body / layers * (FULL_LAYERS - layers)
        for_steps = 50
        ideal = 3.0  # every third step computed
        taken = for_steps / ideal * full + (for_steps - for_steps / ideal) * reused
        rows.append(
            {
                "engines": engines,
                "policy": name,
                "computed_step_seconds": computed,
                "computed_step_seconds_30_layers": full,
                "reused_step_seconds": reused,
                "reused_over_computed": reused / full,
                "efficiency_at_ideal_3": for_steps * full / taken / ideal,
            }
        )
    return rows


def measure_peers(
    checkpoint: Path, sessions: dict[str, Session], precision: str, rounds: int, *, compiled: bool
) -> list[dict[str, Any]]:
    """Measure one computed step of ours and of diffusers, at one precision."""
    dtype = getattr(torch, precision)
    model = WanTransformer3DModel.from_pretrained(checkpoint, dtype=dtype).eval()
    latents, text = torch.randn(LATENTS), torch.randn(1, TEXT_TOKENS, 4096)
    timestep = torch.tensor([500.0])

    def eager(transformer: Any) -> Callable[[], object]:
        def call() -> object:
            with torch.no_grad():
                return transformer(latents.to(dtype), timestep, text.to(dtype), return_dict=False)[
                    0
                ]

        return call

    def ours(session: Session) -> Callable[[], object]:
        def call() -> object:
            session.begin(timestep)
            return session.step("cond", 0, {"latents": latents})

        session.set_prompt("cond", {"text_states": text})
        return call

    calls = {"diffusers eager": eager(model)}
    if compiled:
        calls["torch.compile"] = eager(torch.compile(model))
    calls |= {f"freewheel {name}": ours(session) for name, session in sessions.items()}
    seconds: dict[str, list[float]] = {n: [] for n in calls}
    for round_ in range(rounds + 1):
        for name, call in calls.items():
            taken = timed(call)
            note(f"{precision}: round {round_} of {rounds}: {name} {taken:.2f} s")
            if round_ > 0:  # the first one warms up
                seconds[name].append(taken)
    base = seconds["diffusers eager"]
    return [
        {
            "name": name,
            "precision": precision,
            "seconds": statistics.median(found),
            "speedup_over_eager": statistics.median(
                b / f for b, f in zip(base, found, strict=True)
            ),
        }
        for name, found in seconds.items()
    ]


def main(
    out: Out = OUT,
    layers: Annotated[int, typer.Option(help="Layers really run.")] = 2,
    rounds: Annotated[int, typer.Option(help="Rounds counted.")] = 5,
    precisions: Annotated[
        str, typer.Option(help="Comma-separated; bfloat16 takes minutes a step without AMX.")
    ] = "float32,bfloat16",
    compiled: Annotated[bool, typer.Option(help="Also torch.compile.")] = True,
) -> None:
    """Measure steps at Wan 1.3B width."""
    out.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=out))
    try:
        checkpoint = folder / "checkpoint"
        write_checkpoint(GEOMETRY, checkpoint, layers)
        peers: list[dict[str, Any]] = []
        reuse: list[dict[str, Any]] = []
        for precision in precisions.split(","):
            sessions = {"openvino": session_for(checkpoint, folder, "openvino", precision)}
            if precision == "float32":
                for weights in ("inputs", "baked"):
                    session = session_for(checkpoint, folder, "onnxruntime", precision, weights)
                    sessions[f"onnxruntime, {weights}"] = session
            peers += measure_peers(checkpoint, sessions, precision, rounds, compiled=compiled)
            if precision == "float32":
                for name in ("openvino", "onnxruntime, inputs"):
                    reuse += measure_reuse(name, sessions[name], layers, rounds)
    finally:
        shutil.rmtree(folder)
    data = {
        "geometry": GEOMETRY,
        "layers": layers,
        "tokens": TOKENS,
        "peers": peers,
        "reuse": reuse,
    }
    typer.echo(write(out, "step", "Steps at Wan 1.3B width", data, *tables(data)))


def tables(data: dict[str, Any]) -> tuple[Table, Table]:
    """Return computed steps beside peers', and reused ones beside computed ones."""
    peers = [
        [p["name"], p["precision"], f"{p['seconds']:.3f}", f"{p['speedup_over_eager']:.2f}×"]
        for p in data["peers"]
    ]
    reuse = [
        [
            r["engines"],
            r["policy"],
            f"{r['computed_step_seconds_30_layers']:.2f}",
            f"{r['reused_step_seconds']:.4f}",
            f"{r['reused_over_computed']:.2%}",
            f"{r['efficiency_at_ideal_3']:.3f}",
        ]
        for r in data["reuse"]
    ]
    about = (
        f"{data['geometry']} cut to {data['layers']} layers, {data['tokens']} tokens, "
        f"{TEXT_TOKENS} text tokens:"
    )
    extrapolated = f"Body extrapolated to {FULL_LAYERS} layers by seconds per layer; one step in three computed:"
    columns = [
        "engines",
        "policy",
        "computed step s",
        "reused step s",
        "reused / computed",
        "measured / ideal speedup",
    ]
    return (
        Table(
            ["computed step", "precision", "seconds", "speedup over eager"], peers, about, texts=2
        ),
        Table(columns, reuse, extrapolated, texts=2),
    )


if __name__ == "__main__":
    typer.run(main)
