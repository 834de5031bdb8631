# SPDX-License-Identifier: Apache-2.0
r"""Ways to choose the computed steps of a solved schedule, at what they cost, on held-out captions.

    python benchmarks/paths.py out/demo/bundle --out out/paths

Every way begins from the same recorded uncached runs. DPCache's is written from its paper and code: a table of
forecast errors of three computed steps, and dynamic programming that knows the last two.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from page import OUT, Out, Table, write
from quality import captions
from torch import Tensor

from freewheel.bundle.reader import Bundle
from freewheel.policies.promise import EQUAL_PSNR
from freewheel.policies.setting import CacheSetting, GuardSetting
from freewheel.policies.solved import SolvedConfig
from freewheel.runtime.pipeline.generate import Generator
from freewheel.runtime.pipeline.request import GenerationRequest
from freewheel.runtime.settings import choose_setting
from freewheel.runtime.step_record import StepRecord
from freewheel.tuning.gram import GramRecorder
from freewheel.tuning.lockstep import Lockstep, Point, sampler_table
from freewheel.tuning.paths import best_paths
from freewheel.tuning.quality import compare_videos
from freewheel.tuning.search import Computed, candidates, search
from freewheel.tuning.solve import Solution, early_weights, solve
from freewheel.tuning.solved_configs import schedule_of

WINDOW = 16
FIRST_SEED, HELD_OUT_SEED = 1000, 0
ORDER, FIRST_FULL = 2, 3
"""DPCache's defaults: order of its forecast, and steps computed at the beginning."""


class Recorder(GramRecorder):
    """Also keeps the residuals of the branch ``cond``."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.residuals: list[list[Tensor]] = []

    def on_step(self, record: StepRecord, dims: Mapping[str, int]) -> None:
        """Take one step of one branch."""
        super().on_step(record, dims)
        if record.branch == "cond":
            if record.step_index == 0:
                self.residuals.append([])
            self.residuals[-1].append(record.residual.clone())


class Counting(Lockstep):
    """Counts the steps that it computes and reuses."""

    computed = reused = 0

    def advance(self, point: Point, *, compute: bool) -> Point:
        """Take one step, and count it."""
        if compute:
            self.computed += 1
        else:
            self.reused += 1
        return super().advance(point, compute=compute)


def path_costs(residuals: list[Tensor], order: int = ORDER) -> np.ndarray:
    """Return DPCache's table of one run: [m, i, j], the error of forecasts from i up to step j.

    The forecast is Taylor's of an order, from step i, step m before it and the steps next before m.
    Step j's own error counts too, and behind the last step stands a forecast.
    """
    steps = len(residuals)
    reach = max(int(0.3 * steps), 1)
    behind = torch.stack(residuals[-order - 1 :]).mean(0)
    last = taylor([steps - 1 - k for k in range(order + 1)], residuals, steps)
    aims = [*residuals, 0.8 * last + 0.2 * behind]
    found = np.full((steps, steps + 1, steps + 1), np.inf)
    for i in range(order):
        found[: i + 1, i, i + 1] = 0.0
    for i in range(order, steps):
        for m in range(max(0, i - reach, order - 1), i):
            held = [i, *range(m, m - order, -1)]
            errors = [
                float((taylor(held, residuals, j) - aims[j]).abs().mean()) / 2
                for j in range(i + 1, steps + 1)
            ]
            found[m, i, i + 1 :] = np.cumsum(errors)
    return found


def taylor(held: list[int], residuals: list[Tensor], step: int) -> Tensor:
    """Return the forecast of a step by finite differences of those held, newest first."""
    level = [(residuals[s], s) for s in held]
    total, factor = level[0][0].clone(), 1.0
    for order in range(1, len(held)):
        level = [((new - old) / (at - before), at) for (new, at), (old, before) in pairwise(level)]
        factor *= (step - held[0]) / order
        total += factor * level[0][0]
    return total


def dpcache(costs: np.ndarray, count: int, first: int = FIRST_FULL) -> Computed:
    """Return DPCache's schedule of so many computed steps, the first ones among them."""
    steps = costs.shape[0]
    reach = max(int(0.3 * steps), 1)
    total = np.full((count + 1, steps + 1), np.inf)
    before = np.zeros((count + 1, steps + 1), int)
    total[0, 0] = 0.0
    for k in range(1, count + 1):
        for j in range(k, steps + 1):
            for i in range(max(k - 1, j - reach), j):
                if any(i < wanted < j for wanted in range(first)):
                    continue
                m = 0 if i == 0 else i - 1 if i < first else before[k - 1, i]
                cost = total[k - 1, i] + costs[m, i, j]
                if cost < total[k, j]:
                    total[k, j], before[k, j] = cost, i
    path = [steps]
    assert np.isfinite(total[count, steps]), "as many steps as gaps of a third of the run need"
    for k in range(count, 0, -1):
        path.insert(0, int(before[k, path[0]]))
    return tuple(path[:-1])


def main(
    bundle: Annotated[Path, typer.Argument(help="Bundle of the demo model.")],
    out: Out = OUT,
    steps: Annotated[int, typer.Option(help="Denoise steps.")] = 20,
    budgets: Annotated[str, typer.Option(help="Computed steps, by commas.")] = "5,7,10",
    prompts: Annotated[int, typer.Option(help="Captions to calibrate on.")] = 8,
    pairs: Annotated[int, typer.Option(help="Held-out captions, one seed each.")] = 16,
    pixels: Annotated[int, typer.Option(help="Height and width.")] = 96,
    frames: Annotated[int, typer.Option(help="Frames.")] = 17,
    rounds: Annotated[int, typer.Option(help="Rounds of moving computed steps.")] = 3,
) -> None:
    """Measure; the file is written after every held-out caption."""
    opened = Bundle(bundle)
    counts = [int(c) for c in budgets.split(",")]
    base = choose_setting(opened, "off", {}, typer.echo)
    generator = Generator(opened)
    model = generator.transformer.session.model
    recorder = Recorder(model, window=WINDOW)

    def request(prompt: str, cache: CacheSetting, seed: int) -> GenerationRequest:
        return GenerationRequest(
            prompt=prompt,
            cache=cache,
            defaults=base.generation,
            steps=steps,
            seed=seed,
            height=pixels,
            width=pixels,
            frames=frames,
        )

    began = time.perf_counter()
    for index, prompt in enumerate(captions(prompts, held_out=False)):
        generator.generate(request(prompt, base.cache, FIRST_SEED + index), recorder=recorder)
    recorded = time.perf_counter() - began
    typer.echo(f"recorded in {recorded:.0f} s", err=True)
    grams = recorder.grams()
    scale = base.generation.guidance_scale
    guidance = dict(zip(grams.branches, (scale, 1.0 - scale), strict=True))
    sigmas = np.append(recorder.tables["sigmas"], 0.0)
    table = sampler_table(opened, recorder.tables["timesteps"])
    assert table is not None, "the bundle has a table of the run's sampler"
    lockstep = Counting(model, recorder.starts, table, guidance, history=6)
    costs = np.mean([path_costs(own) for own in recorder.residuals], axis=0)
    found = candidates(grams, guidance, sigmas, history=6)
    uncached_fits = solve(grams, guidance, early_weights(sigmas), history=3)

    rows: dict[str, dict[str, Any]] = {}

    def add(
        name: str, settings: Callable[[], dict[int, tuple[Computed, CacheSetting, float | None]]]
    ) -> None:
        lockstep.computed = lockstep.reused = 0
        began = time.perf_counter()
        made = settings()
        rows[name] = {
            "computed": lockstep.computed,
            "reused": lockstep.reused,
            "seconds": time.perf_counter() - began,
            "schedules": {c: list(s) for c, (s, _, _) in made.items()},
            "fitted_db": {c: d for c, (_, _, d) in made.items()},
            "settings": {c: s for c, (_, s, _) in made.items()},
            "psnr": {c: [] for c in made},
        }
        typer.echo(
            f"{name}: {rows[name]['seconds']:.0f} s, {rows[name]['fitted_db']}, {rows[name]['schedules']}",
            err=True,
        )

    def solved(solutions: Mapping[int, Solution], *, is_run: bool = True) -> Any:
        return {
            c: (
                s.computed,
                SolvedConfig(infer_steps=steps, schedules=[schedule_of(s)]).setting(),
                -s.error if is_run else None,
            )
            for c, s in solutions.items()
            if c in counts
        }

    def published() -> Any:
        made = {}
        for c in counts:
            schedule = dpcache(costs, c)
            guard = GuardSetting(first_exact=1, last_exact=0, exact_steps=list(schedule))
            parameters = {"interval": 1000, "order": ORDER}
            made[c] = (
                schedule,
                CacheSetting(policy="taylorseer", parameters=parameters, guard=guard),
                None,
            )
        return made

    add("DPCache: its table, its forecast", published)
    add("solved on uncached runs alone", lambda: solved(uncached_fits, is_run=False))
    add(
        "DPCache's steps, mixes fitted on their run",
        lambda: solved({c: search(lockstep, [dpcache(costs, c)], rounds=0) for c in counts}),
    )
    add(
        "solved for one weight and two residuals, mixes fitted on their run",
        lambda: solved({c: search(lockstep, [found[c][2.0, 2]], rounds=0) for c in counts}),
    )
    add(
        "best of the schedules solved for four weights and two lengths",
        lambda: solved({c: search(lockstep, found[c].values(), rounds=0) for c in counts}),
    )
    add(
        "the same, steps moved",
        lambda: solved({c: search(lockstep, found[c].values(), rounds=rounds) for c in counts}),
    )
    add("paths over real runs", lambda: solved(best_paths(lockstep, counts)))
    typer.echo(f"all in {time.perf_counter() - began:.0f} s", err=True)
    for index, prompt in enumerate(captions(pairs, held_out=True)):
        exact = generator.generate(request(prompt, base.cache, HELD_OUT_SEED)).frames
        for row in rows.values():
            for count, setting in row["settings"].items():
                made = generator.generate(request(prompt, setting, HELD_OUT_SEED)).frames
                psnr = compare_videos(made, exact).psnr
                row["psnr"][count].append(EQUAL_PSNR if psnr is None else psnr)
        figures = {
            "steps": steps,
            "pixels": pixels,
            "frames": frames,
            "pairs": index + 1,
            "prompts": prompts,
            "recorded_seconds": recorded,
            "rows": {n: {k: v for k, v in r.items() if k != "settings"} for n, r in rows.items()},
        }
        text = write(
            out, "paths", "Choosing computed steps", figures, table_of(rows, counts, figures)
        )
        typer.echo(f"{index + 1} of {pairs}", err=True)
    typer.echo(text)


def table_of(rows: Mapping[str, Any], counts: list[int], figures: Mapping[str, Any]) -> Table:
    """Return PSNR, mean and worst, at each number of computed steps, and what each way took."""
    cells = []
    for name, row in rows.items():
        looks = [
            f"{np.mean(row['psnr'][c]):.1f} ({min(row['psnr'][c]):.1f})"
            if c in row["psnr"]
            else None
            for c in counts
        ]
        cells.append([name, *looks, row["computed"], row["reused"], f"{row['seconds']:.0f}"])
    text = (
        f"{figures['steps']} steps, {figures['prompts']} captions calibrated on, {figures['pairs']} held out. PSNR in "
        "dB, mean (worst). Steps that were computed and reused beyond the recorded runs, for all captions each:"
    )
    columns = [
        "computed steps chosen by",
        *(f"{c} computed" for c in counts),
        "computed",
        "reused",
        "seconds",
    ]
    return Table(columns, cells, text)


if __name__ == "__main__":
    typer.run(main)
