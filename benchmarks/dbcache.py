# SPDX-License-Identifier: Apache-2.0
"""Which blocks should always run: quality of `dbcache` by first and last blocks, at equal ideal speedups.

    python benchmarks/dbcache.py out/demo/bundle --pairs 4 --steps 30

Each way of dividing the body runs at several thresholds beside the uncached run. The ideal speedup counts
the blocks that always run; PSNR at a speedup lies on the line between its neighbours.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from page import OUT, Out, Table, write
from quality import FIRST_SEED, captions

from freewheel.bundle.reader import Bundle
from freewheel.policies.setting import CacheSetting, GuardSetting
from freewheel.runtime.pipeline.generate import Generator
from freewheel.runtime.pipeline.request import GenerationRequest
from freewheel.tuning.quality import compare_videos

DIVISIONS = ((1, 0), (2, 0), (1, 1), (2, 2))
"""First and last blocks; the first is First-Block Cache with a warm-up."""

THRESHOLDS = (0.06, 0.12, 0.2, 0.3, 0.45)
SPEEDUPS = (1.5, 2.0, 2.5, 3.0)
WARM_UP = 4


def main(
    bundle: Annotated[Path, typer.Argument(help="Of the demo model.")],
    pairs: Annotated[int, typer.Option(help="Held-out captions, one seed each.")] = 4,
    steps: Annotated[int, typer.Option(help="Denoise steps.")] = 30,
    out: Out = OUT,
) -> None:
    """Measure; the tables are written after every caption."""
    text = ""
    opened = Bundle(bundle)
    generator = Generator(opened)
    manifest = opened.manifest
    defaults = manifest.configs[manifest.default_config].generation
    found: dict[tuple[int, int, float], list[tuple[float, float, float]]] = {}
    for prompt in captions(pairs, held_out=True):

        def run(setting: CacheSetting, prompt: str = prompt) -> tuple[np.ndarray, float, float]:
            request = GenerationRequest(prompt, setting, defaults, steps=steps, seed=FIRST_SEED)
            made = generator.generate(request)
            told = made.statistics
            return np.asarray(made.frames), told.computed_steps, told.ideal_speedup

        exact = run(CacheSetting())[0]
        for first, last in DIVISIONS:
            for threshold in THRESHOLDS:
                parameters = {"first_blocks": first, "last_blocks": last, "threshold": threshold}
                frames, computed, ideal = run(
                    CacheSetting(
                        policy="dbcache",
                        parameters=parameters,
                        guard=GuardSetting(first_exact=WARM_UP),
                    )
                )
                psnr = compare_videos(frames, exact).psnr
                key = first, last, threshold
                found.setdefault(key, []).append((computed, ideal, psnr or np.inf))
        figures = [{"division": key, "runs": runs} for key, runs in found.items()]
        title = "First and last blocks that always run"
        text = write(out, "dbcache", title, {"steps": steps, "found": figures}, *tables(found))
    typer.echo(text)


def tables(found: dict[tuple[int, int, float], list[tuple[float, float, float]]]) -> list[Table]:
    """Return what each division gives by threshold, and at equal speedups."""
    curves: dict[tuple[int, int], list[tuple[float, float]]] = {}
    rows: list[list[Any]] = []
    for (first, last, threshold), runs in found.items():
        computed, ideal, psnr = np.mean(runs, axis=0)
        worst = min(run[2] for run in runs)
        rows.append(
            [
                f"{first}, {last}",
                f"{threshold:g}",
                *(f"{x:.1f}" for x in (computed, psnr, worst)),
                f"{ideal:.2f}",
            ]
        )
        curves.setdefault((first, last), []).append((ideal, psnr))
    at_equal: list[list[Any]] = []
    for (first, last), curve in curves.items():
        speeds, psnrs = zip(*sorted(curve), strict=True)
        at = [np.interp(s, speeds, psnrs, left=np.nan, right=np.nan) for s in SPEEDUPS]
        at_equal.append([f"{first}, {last}", *(None if np.isnan(p) else f"{p:.1f}" for p in at)])
    columns = ["first, last", "threshold", "computed", "PSNR dB", "worst", "ideal speedup"]
    speedups = ["first, last", *(f"{s:g}×" for s in SPEEDUPS)]
    return [
        Table(speedups, at_equal, "PSNR in dB at equal ideal speedups:"),
        Table(columns, rows, "Each threshold:"),
    ]


if __name__ == "__main__":
    typer.run(main)
