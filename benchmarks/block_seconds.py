# SPDX-License-Identifier: Apache-2.0
"""Seconds of a block in a whole model, and in the same geometry cut to few blocks.

    python benchmarks/block_seconds.py out/t2v-bundle out/t2v2-bundle

Both run in turn in one process, each for as long, so that they compare on a machine whose pace
changes. Bundles as in `real_size.py`; the second of ``--layers 2``.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Annotated

import torch
import typer
from real_size import latents_of, prompt_states

from freewheel.bundle.reader import Bundle
from freewheel.policies.setting import CacheSetting
from freewheel.runtime.model import LoadedModel
from freewheel.runtime.session import Session

ROUNDS = 6


def compare(
    whole: Bundle, cut: Bundle, size: tuple[int, int, int]
) -> list[tuple[int, list[float]]]:
    """Return numbers of blocks, and seconds per block of every step, of bundles that run in turn."""
    sessions = [Session(LoadedModel(bundle)) for bundle in (whole, cut)]
    for session in sessions:
        session.set_prompt("cond", prompt_states(session))
    blocks = [session.manifest.block_count for session in sessions]
    latents = latents_of(sessions[0], size)
    taken: list[list[float]] = [[], []]
    for turn in range(ROUNDS + 1):  # the first warms up
        for which, steps in enumerate((1, round(blocks[0] / blocks[1]))):
            session = sessions[which]
            session.begin(torch.linspace(999, 100, steps), CacheSetting())
            for step in range(steps):
                session.step("cond", step, {"latents": latents})
            seconds = session.statistics.branches["cond"].seconds
            taken[which] += [s / blocks[which] for s in seconds if turn]
    return list(zip(blocks, taken, strict=True))


def main(
    whole: Annotated[Path, typer.Argument(help="Folder that `freewheel build` wrote.")],
    cut: Annotated[Path, typer.Argument(help="The same of a model of fewer blocks.")],
    height: Annotated[int, typer.Option(help="Pixels.")] = 480,
    width: Annotated[int, typer.Option(help="Pixels.")] = 832,
    frames: Annotated[int, typer.Option(help="Latent frames.")] = 1,
) -> None:
    """Measure and print one row per bundle."""
    torch.manual_seed(0)
    typer.echo("| blocks | a block, s: median | mean | range | steps |\n|--:|--:|--:|--:|--:|")
    for blocks, taken in compare(Bundle(whole), Bundle(cut), (height, width, frames)):
        median, mean = statistics.median(taken), statistics.mean(taken)
        typer.echo(
            f"| {blocks} | {median:.3f} | {mean:.3f} | {min(taken):.3f}–{max(taken):.3f} | {len(taken)} |"
        )


if __name__ == "__main__":
    typer.run(main)
