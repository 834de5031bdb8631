# SPDX-License-Identifier: Apache-2.0
r"""A bound on PSNR per request: how many runs keep it, at how many more computed steps.

    freewheel calibrate out/demo/bundle --prompts prompts.txt --hold-out 40 --steps 20 --out calibration.json
    python benchmarks/min_psnr.py out/demo/bundle --cache calibration.json#solved --out out/min_psnr

Every bound is asked for as a request does, over captions that neither training nor calibration saw, with
several seeds each. Beside it the choice by the average: the fewest computed steps whose mean PSNR over the same
held-out calibration runs meets the bound. What a run shows of itself before its middle (how far residuals and
outputs moved, what guidance adds) is set beside the PSNR that came out: whether an adaptive bound could
have known.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from page import OUT, Out, Table, write
from quality import HELD_OUT, captions
from scipy.stats import spearmanr
from torch import Tensor

from freewheel.bundle.reader import Bundle
from freewheel.configs.load import load_config
from freewheel.core.errors import ConfigError
from freewheel.policies.overrides import apply_overrides
from freewheel.policies.promise import COVERAGE, EQUAL_PSNR
from freewheel.policies.schedule import Schedule
from freewheel.policies.setting import CacheSetting
from freewheel.policies.solved import Solved, SolvedConfig
from freewheel.runtime.pipeline.generate import Generator
from freewheel.runtime.pipeline.request import GenerationRequest
from freewheel.runtime.settings import choose_setting
from freewheel.runtime.step_record import StepRecord
from freewheel.tuning.held_out import taking
from freewheel.tuning.quality import compare_videos

FIRST_SEED = 500


class Watcher:
    """What a run shows of itself in its first half, by computed steps of the branch ``cond``."""

    wants_signals = False
    across_experts = False

    def on_run(self, tables: Mapping[str, Tensor], schedule: Schedule) -> None:
        """Start over."""
        self._half = len(schedule) // 2
        self._last: dict[tuple[str, str], Tensor] = {}
        self._moved: dict[str, list[float]] = {}
        self._step = {"cond": -1, "uncond": -1}

    def on_step(self, record: StepRecord, dims: Mapping[str, int]) -> None:
        """Measure how far a computed step's residual and output are from the last one's."""
        self._step[record.branch] += 1
        if not record.computed or self._step[record.branch] >= self._half:
            return
        for name, tensor in (("residual", record.residual), ("output", record.model_output)):
            last = self._last.get((record.branch, name))
            if last is not None and record.branch == "cond":
                self._note(f"change of {name}", tensor, last)
            self._last[record.branch, name] = tensor.clone()
        cond = self._last.get(("cond", "output"))
        if record.branch == "uncond" and cond is not None:
            self._note("guidance", record.model_output, cond)

    def _note(self, name: str, tensor: Tensor, other: Tensor) -> None:
        self._moved.setdefault(name, []).append(float((tensor - other).norm() / other.norm()))

    @property
    def signals(self) -> dict[str, float]:
        """Mean of each over the steps."""
        return {name: float(np.mean(values)) for name, values in self._moved.items()}


def by_average(config: SolvedConfig, bound: float) -> int | None:
    """Return the fewest computed steps whose mean PSNR meets a bound."""
    means = ((len(s.computed), np.mean(s.psnr or [0.0])) for s in config.schedules)
    return next((count for count, mean in means if mean >= bound), None)


def correlations(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the rank correlation of every signal with the PSNR, by computed steps."""
    found: dict[str, dict[str, float]] = {}
    for budget in sorted({b for r in rows for b in r["signals"]}, key=int):
        names = rows[0]["signals"][budget]
        psnr = [r["psnr"][budget] for r in rows]
        found[budget] = {
            n: float(spearmanr([r["signals"][budget][n] for r in rows], psnr).statistic)
            for n in names
        }
    return found


def main(
    bundle: Annotated[Path, typer.Argument(help="Bundle of the demo model.")],
    cache: Annotated[str, typer.Option(help="A solved config with held-out runs.")],
    out: Out = OUT,
    runs: Annotated[int, typer.Option(help="Runs: captions, seed after seed.")] = 231,
    bounds: Annotated[str, typer.Option(help="dB, by commas.")] = "36,40,44,48",
) -> None:
    """Measure; the file is written after every run."""
    opened = Bundle(bundle)
    chosen = choose_setting(opened, cache, {}, typer.echo)
    config = load_config(cache)
    assert isinstance(config, SolvedConfig), "a solved config"
    plan: dict[float, tuple[int, int]] = {}
    for bound in (float(b) for b in bounds.split(",")):
        try:
            kept = apply_overrides(chosen.cache, {"min_psnr": str(bound)}, Solved.spec)
        except ConfigError as error:
            typer.echo(f"left out: {error}")
            continue
        average = by_average(config, bound)
        assert average is not None, "the bound of most runs is below their mean"
        plan[bound] = (int(kept.parameters["computed_steps"]), average)  # type: ignore[arg-type]
    typer.echo(f"computed steps, by bound and by average: {plan}")
    budgets = sorted({b for pair in plan.values() for b in pair})
    generator = Generator(opened)
    texts = captions(HELD_OUT, held_out=True)
    rows: list[dict[str, Any]] = []
    for index in range(runs):

        def run(cache: CacheSetting, watcher: Watcher | None = None, index: int = index) -> Any:
            request = GenerationRequest(
                prompt=texts[index % HELD_OUT],
                cache=cache,
                defaults=chosen.generation,
                seed=FIRST_SEED + index // HELD_OUT,
            )
            return generator.generate(request, recorder=watcher).frames

        exact = run(CacheSetting())
        row: dict[str, Any] = {"psnr": {}, "signals": {}}
        for budget in budgets:
            watcher = Watcher()
            psnr = compare_videos(run(taking(chosen.cache, budget), watcher), exact).psnr
            row["psnr"][str(budget)] = EQUAL_PSNR if psnr is None else psnr
            row["signals"][str(budget)] = watcher.signals
        rows.append(row)
        found = {}
        for bound, (ours, average) in plan.items():
            kept = {
                b: float(np.mean([r["psnr"][str(b)] >= bound for r in rows]))
                for b in (ours, average)
            }
            found[f"{bound:g}"] = {
                "computed": ours,
                "coverage": kept[ours],
                "by_average": average,
                "coverage_by_average": kept[average],
                "more_steps": ours / average - 1,
            }
        summary = {"runs": len(rows), "stated": COVERAGE, "bounds": found}
        if len(rows) > 2:
            summary["correlations"] = correlations(rows)
        figures = {"summary": summary, "runs": rows}
        text = write(out, "min_psnr", "A bound per request", figures, *tables(summary))
        typer.echo(f"{index + 1} of {runs}", err=True)
    typer.echo(text)


def tables(summary: Mapping[str, Any]) -> list[Table]:
    """Return coverage by bound, and what signals would have told, by computed steps."""
    columns = [
        "`--min-psnr`",
        "computed",
        "runs that keep it",
        "by average: computed",
        "runs that keep it",
        "more steps",
    ]
    rows = [
        [
            bound,
            own["computed"],
            f"{own['coverage']:.0%}",
            own["by_average"],
            f"{own['coverage_by_average']:.0%}",
            f"{own['more_steps']:.1%}",
        ]
        for bound, own in summary["bounds"].items()
    ]
    text = f"{summary['runs']} runs; stated coverage {summary['stated']:.0%}:"
    found = [Table(columns, rows, text, texts=0)]
    told = summary.get("correlations", {})
    if told:
        names = list(next(iter(told.values())))
        found.append(
            Table(
                ["computed", *names],
                [[budget, *(f"{own[n]:.2f}" for n in names)] for budget, own in told.items()],
                "Rank correlation of a run's PSNR with what its first half shows:",
                texts=0,
            )
        )
    return found


if __name__ == "__main__":
    typer.run(main)
