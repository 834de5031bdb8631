# SPDX-License-Identifier: Apache-2.0
"""Deadlines beside a CPU hog: how many are missed, and what an oracle would have kept more.

    freewheel calibrate out/demo/bundle --prompts prompts.txt --out calibration.json
    python benchmarks/deadline.py out/demo/bundle --cache calibration.json#solved --out out/deadline

Each run has a deadline between what its fewest and all steps take. A process beside it burns the CPU in
spells of random length. All these runs come first, so that the machine has to be idle for them alone.
The oracle knows the seconds that the steps of this very run took, and takes the schedule of the most
computed steps that ends in time by them; what the run loses is the PSNR of the oracle's frames
against the uncached ones less that of its own.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from page import OUT, Out, Table, write
from quality import HELD_OUT, captions

from freewheel.bundle.reader import Bundle
from freewheel.policies.setting import CacheSetting
from freewheel.runtime.pipeline.generate import Generation, Generator
from freewheel.runtime.pipeline.request import GenerationRequest
from freewheel.runtime.settings import choose_setting
from freewheel.tuning.quality import compare_videos

EQUAL = 60.0
"""dB beyond which frames count as equal: fewer than one of ten values differs, by one level of 255."""

BOUND_RUNS = 5
"""Runs beside the hog that tell what the fewest steps take at most, and all of them half the time."""

HOG = (
    "import random, time\n"
    "while True:\n"
    "    until = time.monotonic() + random.uniform(0.2, 3.0)\n"
    "    while time.monotonic() < until: pass\n"
    "    time.sleep(random.uniform(0.2, 3.0))\n"
)


@contextmanager
def hogs(count: int) -> Iterator[None]:
    """Burn so many cores in spells while the block runs."""
    running = [subprocess.Popen([sys.executable, "-c", HOG]) for _ in range(count)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def oracle_budget(result: Generation, budgets: list[int], deadline: float) -> int | None:
    """Return the most computed steps that would have ended in time by the run's own seconds, if any."""
    statistics = result.statistics
    steps, branches = statistics.steps, statistics.branches.values()
    kinds = {}
    for computed in (True, False):
        taken = [b.step_seconds(computed=computed) for b in branches]
        kinds[computed] = float(sum(np.mean(t) for t in taken if t))
    spare = statistics.loop_seconds - sum(s for b in branches for s in b.seconds if s is not None)
    fits = [b for b in budgets if b * kinds[True] + (steps - b) * kinds[False] + spare <= deadline]
    return max(fits, default=None)


def main(
    bundle: Annotated[Path, typer.Argument(help="Folder that `build` wrote.")],
    cache: Annotated[str, typer.Option(help="A solved config with schedules of many budgets.")],
    out: Out = OUT,
    runs: Annotated[int, typer.Option(help="Runs with a deadline.")] = 200,
    busy: Annotated[int, typer.Option(help="Processes that burn the CPU.")] = 1,
    steps: Annotated[int | None, typer.Option(help="Denoise steps.")] = None,
) -> None:
    """Measure misses and losses."""
    opened = Bundle(bundle)
    chosen = choose_setting(opened, cache, {}, typer.echo)
    setting = chosen.cache
    budgets = [int(b) for b in setting.parameters["budgets"]]  # type: ignore[union-attr]  # a list
    generator = Generator(opened)
    random = np.random.default_rng(0)
    prompts = captions(min(runs, HELD_OUT), held_out=True)

    def run(index: int, cache: CacheSetting) -> Generation:
        request = GenerationRequest(
            prompt=prompts[index % len(prompts)],
            cache=cache,
            defaults=chosen.generation,
            steps=steps,
            seed=index,
        )
        return generator.generate(request)

    def taking(count: int) -> CacheSetting:
        return setting.model_copy(
            update={"parameters": {**setting.parameters, "computed_steps": count}}
        )

    rows: list[dict[str, Any]] = []
    with hogs(busy):
        run(0, taking(budgets[0]))
        fewest, all_steps = (
            [run(0, taking(b)).statistics.loop_seconds for _ in range(BOUND_RUNS)]
            for b in (budgets[0], budgets[-1])
        )
    low, high = 1.2 * max(fewest), float(np.median(all_steps))
    hurried: list[tuple[float, Generation]] = []
    with hogs(busy):
        for index in range(runs):
            deadline = float(random.uniform(low, max(low, high)))
            own = taking(budgets[-1]).model_copy(update={"deadline": deadline})
            hurried.append((deadline, run(index, own)))
    typer.echo("the runs with a deadline are done", err=True)
    for index, (deadline, kept) in enumerate(hurried):
        best = oracle_budget(kept, budgets, deadline)
        exact = run(index, CacheSetting()).frames
        found, wanted = (
            compare_videos(r.frames, exact).psnr
            for r in (kept, run(index, taking(best or budgets[0])))
        )
        rows.append(
            {
                "deadline": deadline,
                "seconds": kept.statistics.loop_seconds,
                "computed": kept.statistics.computed_steps,
                "oracle": best,
                "psnr": found,
                "oracle_psnr": wanted,
            }
        )
        typer.echo(str(rows[-1]), err=True)
    late = [r["seconds"] / r["deadline"] - 1 for r in rows if r["seconds"] > r["deadline"]]
    hopeless = sum(r["oracle"] is None for r in rows)
    loss = [min(r["oracle_psnr"] or EQUAL, EQUAL) - min(r["psnr"] or EQUAL, EQUAL) for r in rows]
    summary = {
        "runs": runs,
        "missed": len(late),
        "missed_by_the_oracle_too": hopeless,
        "worst_lateness": max(late, default=0.0),
        "mean_loss_db": float(np.mean(loss)),
        "median_loss_db": float(np.median(loss)),
        "worst_loss_db": float(np.max(loss)),
    }
    table = Table(
        ["runs", "missed", "worst lateness", "loss to the oracle, dB: mean", "median", "worst"],
        [
            [
                runs,
                len(late),
                f"{summary['worst_lateness']:.1%}",
                f"{summary['mean_loss_db']:.2f}",
                f"{summary['median_loss_db']:.2f}",
                f"{summary['worst_loss_db']:.2f}",
            ]
        ],
        f"{busy} processes burn the CPU beside the runs; deadlines between {low:.2f} and {high:.2f} s:",
        texts=0,
    )
    figures = {"summary": summary, "runs": rows}
    typer.echo(write(out, "deadline", "Deadlines on a busy machine", figures, table))


if __name__ == "__main__":
    typer.run(main)
