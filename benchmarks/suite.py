# SPDX-License-Identifier: Apache-2.0
r"""How well a suite of recorded runs ranks settings: its foretold distances beside real runs.

    freewheel calibrate out/demo/bundle --prompts prompts.txt --out calibration.json
    python benchmarks/suite.py out/demo/bundle --prompts prompts.txt --calibration calibration.json --out out/suite

Every setting of `freewheel replay --suite` is really run on held-out captions, beside the uncached run of the
same seed. Rank correlations (Spearman) of mean PSNR with the foretold mean distance, over all settings and over
those of one speedup; beside it that of the error which a replay without the sampler foretells.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from page import OUT, Out, Table, write
from quality import captions
from scipy.stats import spearmanr

from freewheel.bundle.reader import Bundle
from freewheel.commands.screen import Screen
from freewheel.policies.promise import EQUAL_PSNR
from freewheel.policies.setting import CacheSetting
from freewheel.runtime.pipeline.generate import Generator
from freewheel.runtime.pipeline.request import GenerationRequest
from freewheel.runtime.settings import choose_setting
from freewheel.tuning.bench import read_prompts
from freewheel.tuning.quality import compare_videos
from freewheel.tuning.rank import contest_of
from freewheel.tuning.replay import replay
from freewheel.tuning.suite_recorder import suite_of


def correlation(rows: list[dict[str, Any]], key: str) -> float:
    """Return the rank correlation of a foretold error with the lack of PSNR."""
    psnr = [-r["psnr"] for r in rows]
    return float(spearmanr([r[key] for r in rows], psnr).statistic)


def summary_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return correlations over all settings, and over those of each speedup."""
    speedups = sorted({r["name"].split()[-1] for r in rows if r["name"].split()[-1][0].isdigit()})
    within = {x: [r for r in rows if r["name"].split()[-1] == x] for x in speedups}
    return {
        "settings": len(rows),
        "suite": correlation(rows, "foretold_db"),
        "replay_alone": correlation(rows, "replayed_error"),
        "suite_within": {x: correlation(own, "foretold_db") for x, own in within.items()},
        "replay_alone_within": {x: correlation(own, "replayed_error") for x, own in within.items()},
    }


def main(
    bundle: Annotated[Path, typer.Argument(help="Bundle of the demo model.")],
    prompts: Annotated[Path, typer.Option(help="Of the suite, one per line.")],
    out: Out = OUT,
    calibration: Annotated[Path | None, typer.Option(help="What `calibrate` wrote.")] = None,
    pairs: Annotated[int, typer.Option(help="Held-out captions, one seed each.")] = 8,
    steps: Annotated[int, typer.Option(help="Denoise steps.")] = 50,
) -> None:
    """Measure; the file is written after every caption."""
    screen = Screen(as_json=False, quiet=False)
    opened = Bundle(bundle)
    suite = suite_of(opened, read_prompts(prompts), steps=steps, first_seed=1000, progress=screen)
    settings = contest_of(suite, opened.manifest.policies, calibration)
    foretold = {name: suite.foretell(setting) for name, setting in settings.items()}
    replayed = {name: replay(suite.runs[0].trace, s).error for name, s in settings.items()}
    generator = Generator(opened)
    base = choose_setting(opened, None, {}, typer.echo).generation
    psnr: dict[str, list[float]] = {name: [] for name in settings}
    counts: dict[str, list[float]] = {name: [] for name in settings}
    for index, prompt in enumerate(captions(pairs, held_out=True)):

        def run(cache: CacheSetting, prompt: str = prompt) -> Any:
            return generator.generate(
                GenerationRequest(prompt=prompt, cache=cache, defaults=base, steps=steps, seed=0)
            )

        exact = run(CacheSetting()).frames
        for name, setting in settings.items():
            result = run(setting)
            found = compare_videos(result.frames, exact).psnr
            psnr[name].append(EQUAL_PSNR if found is None else found)
            counts[name].append(float(result.statistics.computed_steps))
        rows = [
            {
                "name": name,
                "psnr": float(np.mean(psnr[name])),
                "computed_steps": float(np.mean(counts[name])),
                "foretold_db": foretold[name].mean,
                "foretold_steps": foretold[name].computed_steps,
                "replayed_error": replayed[name],
            }
            for name in settings
        ]
        summary = {"pairs": index + 1, "steps": steps, **summary_of(rows)}
        figures = {"summary": summary, "suite": dict(suite.about), "rows": rows}
        text = write(out, "suite", "Ranking without the model", figures, *tables(summary, rows))
        typer.echo(f"{index + 1} of {pairs}", err=True)
    typer.echo(text)


def tables(summary: dict[str, Any], rows: list[dict[str, Any]]) -> tuple[Table, Table]:
    """Return the rank correlations, and every setting's foretold and real distance."""
    correlations = [
        ["all settings", f"{summary['suite']:.2f}", f"{summary['replay_alone']:.2f}"],
        *(
            [f"those at {x}", f"{own:.2f}", f"{summary['replay_alone_within'][x]:.2f}"]
            for x, own in summary["suite_within"].items()
        ),
    ]
    text = f"Rank correlation with PSNR, {summary['pairs']} pairs of {summary['steps']} steps:"
    settings = [
        [
            r["name"],
            f"{r['computed_steps']:.1f}",
            f"{r['psnr']:.1f}",
            f"{r['foretold_db']:.1f}",
            f"{r['replayed_error']:.3g}",
        ]
        for r in sorted(rows, key=lambda r: -r["psnr"])
    ]
    columns = ["setting", "computed", "PSNR dB", "foretold dB", "error by replay alone"]
    return (
        Table([f"{summary['settings']} settings", "suite", "replay alone"], correlations, text),
        Table(columns, settings),
    )


if __name__ == "__main__":
    typer.run(main)
