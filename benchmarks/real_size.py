# SPDX-License-Identifier: Apache-2.0
"""Run a model of real size, all its layers, through several steps with each policy.

    python benchmarks/synthetic.py wan2.1-t2v-1.3b --dtype bfloat16 --out out/t2v
    freewheel build out/t2v --precision bfloat16 --backend openvino --out out/t2v-bundle
    python benchmarks/real_size.py out/t2v-bundle

Measured are the seconds of each computed and reused step, peak resident memory (mapped files and
copies apart), the bytes that the disk had to read, and the measured over the ideal speedup.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from memory import MemorySampler, read_bytes
from page import OUT, Out, Table, write

from freewheel.bundle.reader import Bundle
from freewheel.policies.setting import CacheSetting
from freewheel.runtime.model import Model
from freewheel.runtime.session import Session

TEXT_TOKENS, IMAGE_TOKENS = 512, 257
ALWAYS = 1e6
"""A threshold that nothing passes: what must be computed is, and nothing else."""

SETTINGS: dict[str, CacheSetting] = {
    "off": CacheSetting(),
    "teacache": CacheSetting(policy="teacache", parameters={"threshold": ALWAYS}),
    "taylorseer": CacheSetting(policy="taylorseer", parameters={"interval": 3}),
    "adacache": CacheSetting(
        policy="adacache", parameters={"codebook_thresholds": [ALWAYS], "codebook_skips": [4]}
    ),
    "custom": CacheSetting(policy="custom", parameters={"threshold": ALWAYS}),
    "easycache": CacheSetting(policy="easycache", parameters={"threshold": ALWAYS}),
    "firstblock": CacheSetting(policy="firstblock", parameters={"threshold": ALWAYS}),
    "magcache": CacheSetting(policy="magcache", parameters={"threshold": ALWAYS}),
    "solved": CacheSetting(policy="solved", parameters={"steps": 2}),
    "spectrum": CacheSetting(policy="spectrum", parameters={"warmup": 1, "window": 4.0}),
    "hermite": CacheSetting(policy="hermite", parameters={"interval": 3}),
    "foca": CacheSetting(policy="foca", parameters={"interval": 3}),
    "dmd": CacheSetting(policy="dmd", parameters={"interval": 3}),
    "dicache": CacheSetting(policy="dicache", parameters={"threshold": ALWAYS}),
    "seacache": CacheSetting(policy="seacache", parameters={"threshold": ALWAYS}),
    "sencache": CacheSetting(policy="sencache", parameters={"threshold": ALWAYS, "early": 0.0}),
}


def run_policy(session: Session, name: str, steps: int, latents: torch.Tensor) -> dict[str, Any]:
    """Run ``steps`` steps of one branch; the last one of an uncached run is the second."""
    sampler = MemorySampler()
    sampler.start()
    before, began = read_bytes(), time.perf_counter()
    session.begin(torch.linspace(999, 100, steps), SETTINGS[name])
    for step in range(steps if name != "off" else min(steps, 2)):
        # They move as in a run: easycache divides by their change.
        output = session.step("cond", step, {"latents": latents * (1 - step / (2 * steps))})
        branch = session.statistics.branches["cond"]
        typer.echo(
            f"{name}: step {step} {'computed' if branch.computed[step] else 'reused'} in "
            f"{branch.seconds[step]:.3f} s",
            err=True,
        )
    taken, read = time.perf_counter() - began, read_bytes() - before
    sampler.stop()
    computed, reused = (branch.step_seconds(computed=is_computed) for is_computed in (True, False))
    step_seconds = statistics.median(computed)
    speedup = branch.done_steps * step_seconds / sum(computed + reused)
    ideal = branch.done_steps / len(computed)
    peak = sampler.peak()
    return {
        "policy": name,
        "steps": branch.done_steps,
        "computed": len(computed),
        "computed_step_seconds": step_seconds,
        "reused_step_seconds": statistics.median(reused) if reused else None,
        "all_seconds": branch.seconds[: branch.done_steps],
        "speedup": speedup,
        "ideal_speedup": ideal,
        "efficiency": speedup / ideal,
        "run_seconds": taken,
        "read_bytes": read,
        "peak_resident_bytes": peak.resident,
        "peak_copied_bytes": peak.copied,
        "peak_mapped_bytes": peak.mapped,
        "finite": bool(torch.isfinite(output).all()),
    }


def latents_of(session: Session, size: tuple[int, int, int]) -> torch.Tensor:
    """Return random latents [1, C, F, H/8, W/8] of height, width and latent frames."""
    height, width, frames = size
    channels = int(session.manifest.inputs["latents"].shape[1])
    return torch.randn(1, channels, frames, height // 8, width // 8)


def prompt_states(session: Session) -> dict[str, torch.Tensor]:
    """Return random per-prompt inputs of the sizes that Wan's encoders give."""
    tokens = {"text_states": TEXT_TOKENS, "image_states": IMAGE_TOKENS}
    return {
        name: torch.randn(1, tokens[name], int(entry.shape[-1]))
        for name, entry in session.manifest.inputs.items()
        if entry.runs == "prompt"
    }


def main(
    bundle: Annotated[Path, typer.Argument(help="Folder that `freewheel build` wrote.")],
    out: Out = OUT,
    policies: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(SETTINGS),
    steps: Annotated[int, typer.Option(help="Steps of each run.")] = 6,
    height: Annotated[int, typer.Option(help="Pixels.")] = 480,
    width: Annotated[int, typer.Option(help="Pixels.")] = 832,
    frames: Annotated[int, typer.Option(help="Latent frames.")] = 1,
    warm_up: Annotated[bool, typer.Option(help="One computed step ahead, not counted.")] = True,
) -> None:
    """Measure steps and memory of a whole model under each policy."""
    torch.manual_seed(0)
    size = (height, width, frames)
    data = measure(Bundle(bundle), policies.split(","), steps, size, warm_up=warm_up)
    typer.echo(write(out, "real_size", "A whole model under every policy", data, table(data)))


def measure(
    bundle: Bundle, policies: list[str], steps: int, size: tuple[int, int, int], *, warm_up: bool
) -> dict[str, Any]:
    """Open a session and run every policy through it."""
    height, width, frames = size
    session = Session(Model(bundle))
    latents = latents_of(session, size)
    sampler = MemorySampler()
    sampler.start()
    began = time.perf_counter()
    session.set_prompt("cond", prompt_states(session))
    if warm_up:
        session.begin(torch.tensor([999.0]))
        session.step("cond", 0, {"latents": latents})
    first = time.perf_counter() - began
    sampler.stop()
    runs = [run_policy(session, name, steps, latents) for name in policies]
    return {
        "bundle": bundle.folder.name,
        "backend": session.model.backend.name,
        "precision": session.manifest.precision,
        "blocks": session.manifest.block_count,
        "weight_bytes": sum(t.bytes for t in session.manifest.tensors.values()),
        "tokens": frames * (height // 16) * (width // 16),
        "warm_up_seconds": first,
        "warm_up_peak_resident_bytes": sampler.peak().resident,
        "runs": runs,
    }


def table(data: dict[str, Any]) -> Table:
    """Return a row per policy."""
    rows = []
    for run in data["runs"]:
        reused = run["reused_step_seconds"]
        rows.append(
            [
                run["policy"],
                f"{run['computed']} of {run['steps']}",
                f"{run['computed_step_seconds']:.1f}",
                None if reused is None else f"{reused:.3f}",
                f"{run['speedup']:.2f}",
                f"{run['ideal_speedup']:.2f}",
                f"{run['efficiency']:.3f}",
                f"{run['peak_resident_bytes'] / 1e9:.2f}",
                f"{run['peak_copied_bytes'] / 1e9:.2f}",
                f"{run['peak_mapped_bytes'] / 1e9:.2f}",
                f"{run['read_bytes'] / 1e9:.1f}",
            ]
        )
    columns = [
        "policy", "computed", "computed step s", "reused step s", "speedup", "ideal",
        "measured / ideal", "peak resident GB", "copied", "mapped", "read from disk GB",
    ]  # fmt: skip
    text = (
        f"{data['bundle']}: {data['blocks']} blocks, {data['weight_bytes'] / 1e9:.1f} GB of weights, "
        f"{data['backend']}, body {data['precision']}, {data['tokens']} tokens, one branch:"
    )
    return Table(columns, rows, text)


if __name__ == "__main__":
    typer.run(main)
