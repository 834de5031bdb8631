# SPDX-License-Identifier: Apache-2.0
r"""Quality of every policy at the same speedups, on held-out prompts.

    freewheel build models/shapes_wan --out out/demo/bundle --config shapes_wan_off \
        --config firstblock+dmd --config seacache+spectrum
    PYTHONPATH=out/peers python benchmarks/peers.py --out out/bench
    python benchmarks/quality.py out/demo/bundle --measured --peers out/bench/peers.json --out out/bench

Calibrates on training captions, then runs each policy's setting for each speedup on captions that
neither training nor calibration saw, beside the uncached run of the same seed: PSNR, SSIM, VMAF and XPSNR of
decoded frames, and LPIPS with ``--lpips-weights`` (see `perceptual.py`), mean and worst pair; share of the
pairs in which a setting's PSNR is the best of its speedup's; measured speedup as in `freewheel bench`. Beside
them the distance that a suite of recorded runs foretells, and how its ranking correlates with the measured
one. The plot has speed and quality of all, peers among them.

Speedups are ideal ones, steps over computed steps. With ``--measured`` they are those of the clock: a
few runs ahead tell what a reused step costs, and so how few steps may be computed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from page import OUT, Out, Table, write
from perceptual import LPIPS_WEIGHTS, Lpips
from scipy.stats import spearmanr

from freewheel.bundle.reader import Bundle
from freewheel.commands.screen import Screen
from freewheel.policies.promise import EQUAL_PSNR
from freewheel.tuning.bench import UNCACHED, BenchReport, BenchRequest, bench_bundle
from freewheel.tuning.calibrate import calibrate
from freewheel.tuning.calibration import CalibrationRequest, save_calibration
from freewheel.tuning.contest import BY_CONTENT, Ideals
from freewheel.tuning.rank import SPEEDUPS, contest_of
from freewheel.tuning.suite import Suite
from freewheel.tuning.suite_recorder import suite_of
from freewheel.tuning.vmaf import vmaf_of_frames, xpsnr_of_video

MODEL = Path(__file__).resolve().parent.parent / "models" / "shapes_wan"
PROBE_ROUNDS = 8
DIGITS = {"psnr": 1, "ssim": 4, "vmaf": 1, "xpsnr": 1, "lpips": 4}
MEASURES = tuple(DIGITS)
SEEN = ("vmaf", "xpsnr", "lpips")
"""Those of `seen_by_eye`."""
LESS_IS_NEARER = ("lpips",)
COLUMNS = (
    "computed", "speedup", "PSNR dB", "worst", "SSIM", "worst", "VMAF", "worst", "XPSNR dB", "worst",
    "LPIPS", "worst",
)  # fmt: skip
"""What `cells_of` shows of a setting."""
FIRST_SEED = 0
HELD_OUT = 77
"""Captions that training never saw; there are no more."""


def captions(count: int, *, held_out: bool) -> list[str]:
    """Return captions of the demo model that training never saw, or saw."""
    sys.path.insert(0, str(MODEL))
    from generate import held_out_pairs, tuning_pairs

    pairs = held_out_pairs(count) if held_out else tuning_pairs(count)
    return [str(pair.caption) for pair in pairs]


def measured_ideals(bundle: Bundle, suite: Suite, steps: int, screen: Screen) -> dict[str, Ideals]:
    """Return which ideal speedups the clock makes `SPEEDUPS` of, by policy.

    A run of S steps, c of them computed, takes c + (S - c) r computed steps' time, where r is what a
    reused step costs; `taylorseer` stands for all that decide by tables, counters or timesteps.
    """
    kinds = ("taylorseer", *BY_CONTENT)
    whole = contest_of(suite, bundle.manifest.policies, None, {p: {4.0: 4.0} for p in kinds})
    caches = {n: s for n, s in whole.items() if n.rpartition(" ")[0] in kinds}
    prompt = captions(1, held_out=False)
    probe = BenchRequest(
        prompts=prompt, seeds=[FIRST_SEED], steps=steps, rounds=PROBE_ROUNDS, caches=caches
    )
    found: dict[str, Ideals] = {}
    for entry in bench_bundle(bundle, probe, screen, screen.warn).entries[1:]:
        computed, speedup = entry["computed_steps"], entry["speedup"]
        cost = (steps / speedup - computed) / (steps - computed)
        counts = {x: max(2, round((steps / x - steps * cost) / (1 - cost))) for x in SPEEDUPS}
        # Rounded down, so that a division by it gives back the count.
        ideals = {x: int(100 * steps / count) / 100 for x, count in counts.items()}
        found[entry["name"].rpartition(" ")[0]] = ideals
        typer.echo(f"{entry['name']}: a reused step costs {cost:.3f} of a computed one; {ideals}")
    return found


def seen_by_eye(frames: Any, exact: Any, lpips: Lpips | None) -> dict[str, float | None]:
    """Return VMAF and LPIPS, the mean of the frames, and XPSNR of a video."""
    vmaf = vmaf_of_frames(frames, exact)
    return {
        "vmaf": None if vmaf is None else float(np.mean(vmaf)),
        "xpsnr": xpsnr_of_video(frames, exact),
        "lpips": None if lpips is None else lpips(frames, exact),
    }


def group_of(name: str) -> str:
    """Return the speedup in a setting's name; AdaCache's codebooks are a group of their own."""
    return name.rpartition(" ")[2]


def merged(
    reports: Sequence[BenchReport],
    looks: Sequence[Mapping[str, Mapping[str, float | None]]],
    foretold: Mapping[str, float],
) -> dict[str, Any]:
    """Return one table from those of single pairs, beside the distances foretold of each setting."""
    rows: list[dict[str, Any]] = []
    for same in zip(*(r.entries for r in reports), strict=True):
        name = same[0]["name"]
        if name == UNCACHED:
            continue
        psnr = [EQUAL_PSNR if e["psnr_mean"] is None else e["psnr_mean"] for e in same]
        row = {
            "name": name,
            "computed_steps": float(np.mean([e["computed_steps"] for e in same])),
            "speedup": float(np.median([e["speedup"] for e in same])),
            "psnr": psnr,
            "ssim": [e["ssim_mean"] for e in same],
            "foretold_db": foretold.get(name),
        }
        for measure in SEEN:
            row[measure] = [own[name][measure] for own in looks]
        rows.append(row | summarised(row))
    with_share_won(rows)
    known = [(r["foretold_db"], -r["psnr_mean"]) for r in rows if r["foretold_db"] is not None]
    return {
        "steps": reports[0].steps,
        "pairs": len(reports),
        "rank_correlation": float(spearmanr(*zip(*known, strict=True)).statistic),
        "rows": rows,
    }


def summarised(row: Mapping[str, Any]) -> dict[str, float | None]:
    """Return mean and worst of each measure of a row's pairs."""
    found: dict[str, float | None] = {}
    for measure in MEASURES:
        values = [v for v in row[measure] if v is not None]
        found[f"{measure}_mean"] = float(np.mean(values)) if values else None
        worst = max if measure in LESS_IS_NEARER else min
        found[f"{measure}_worst"] = worst(values, default=None)
    return found


def with_share_won(rows: Sequence[dict[str, Any]]) -> None:
    """Tell each row the share of pairs in which its PSNR is the best of its speedup's."""
    for group in {group_of(r["name"]) for r in rows}:
        rivals = [r for r in rows if group_of(r["name"]) == group]
        best = np.max([r["psnr"] for r in rivals], axis=0)
        for row in rivals:
            row["won"] = float(np.mean(np.array(row["psnr"]) >= best))


def cells_of(row: Mapping[str, Any]) -> list[str | None]:
    """Return a setting's cells below `COLUMNS`."""
    looks = [
        None if row[f"{measure}_{kind}"] is None else f"{row[f'{measure}_{kind}']:.{digits}f}"
        for measure, digits in DIGITS.items()
        for kind in ("mean", "worst")
    ]
    speedup = None if row["speedup"] is None else f"{row['speedup']:.2f}"
    return [f"{row['computed_steps']:.1f}", speedup, *looks]


def parts(found: Mapping[str, Any]) -> tuple[Table, str]:
    """Return the table, the best of each speedup first, and what the suite foretold."""
    rows = [
        [
            r["name"],
            *cells_of(r),
            f"{r['won']:.0%}",
            None if r["foretold_db"] is None else f"{r['foretold_db']:.1f}",
        ]
        for r in sorted(found["rows"], key=lambda r: (group_of(r["name"]), -r["psnr_mean"]))
    ]
    return (
        Table(["setting", *COLUMNS, "won", "foretold dB"], rows, f"{found['pairs']} pairs:"),
        f"Rank correlation of foretold distance and PSNR: {found['rank_correlation']:.2f}.",
    )


def with_peers(found: dict[str, Any], peers: Path) -> dict[str, Any]:
    """Return the table with the rows of `peers.py`, of the same pairs, among them."""
    rows = [dict(r) for r in found["rows"]]
    rows += [
        given | {"foretold_db": None} | summarised(given)
        for given in json.loads(peers.read_text(encoding="utf-8"))["rows"]
        if len(given["psnr"]) == found["pairs"]
    ]
    with_share_won(rows)
    return found | {"rows": rows}


def plot(found: dict[str, Any], path: Path) -> None:
    """Draw PSNR over measured speedup, a line per policy; peers dashed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    lines: dict[str, list[tuple[float, float]]] = {}
    for r in found["rows"]:
        if r["speedup"] is not None:
            lines.setdefault(r["name"].rpartition(" ")[0], []).append(
                (r["speedup"], r["psnr_mean"])
            )
    for name, points in sorted(lines.items(), key=lambda line: -max(p for _, p in line[1])):
        style = "--" if ":" in name else "-"
        axes.plot(*zip(*sorted(points), strict=True), style, marker="o", markersize=3, label=name)
    axes.set_xlabel("speedup, measured")
    axes.set_ylabel("PSNR against the uncached run, dB, mean")
    axes.legend(fontsize="x-small", ncols=2)
    figure.savefig(path)


def main(
    bundle: Annotated[Path, typer.Argument(help="Bundle of the demo model.")],
    out: Out = OUT,
    calibration: Annotated[Path | None, typer.Option(help="Use this one.")] = None,
    pairs: Annotated[int, typer.Option(help="Held-out captions, one seed each.")] = 16,
    first: Annotated[int, typer.Option(help="Index of the first held-out caption.")] = 0,
    prompts: Annotated[int, typer.Option(help="Captions to calibrate on.")] = 16,
    steps: Annotated[int, typer.Option(help="Denoise steps.")] = 50,
    only: Annotated[str, typer.Option(help="Policies whose name begins so, by commas.")] = "",
    measured: Annotated[bool, typer.Option(help="Speedups are those of the clock.")] = False,
    suite_of_prompts: Annotated[
        int, typer.Option("--suite-prompts", help="Captions that the suite of runs is recorded on.")
    ] = 8,
    peers: Annotated[
        Path | None, typer.Option(help="peers.json of the same pairs, for the table and the plot.")
    ] = None,
    lpips_weights: Annotated[Path | None, LPIPS_WEIGHTS] = None,
) -> None:
    """Measure; the tables are written after every pair."""
    lpips = None if lpips_weights is None else Lpips(lpips_weights)
    screen = Screen(as_json=False, quiet=False)
    opened = Bundle(bundle)
    out.mkdir(parents=True, exist_ok=True)
    texts = captions(max(prompts, suite_of_prompts), held_out=False)
    with screen.progress():
        suite = suite_of(
            opened, texts[:suite_of_prompts], steps=steps, first_seed=1000, progress=screen
        )
    ideals: dict[str, Ideals] = {p: {x: x for x in SPEEDUPS} for p in ("taylorseer", *BY_CONTENT)}
    if measured:
        ideals |= measured_ideals(opened, suite, steps, screen)
    if calibration is None:
        calibration = out / "calibration.json"
        request = CalibrationRequest(
            texts[:prompts], speedups=list(ideals["taylorseer"].values()), steps=steps
        )
        with screen.progress():
            save_calibration(calibrate(opened, request, screen, screen.warn), calibration)
    caches = contest_of(suite, opened.manifest.policies, calibration, ideals)
    kept = tuple(part for part in only.split(",") if part) or ("",)
    caches = {n: s for n, s in caches.items() if n.startswith(kept)}
    foretold = {name: suite.foretell(cache).mean for name, cache in caches.items()}
    title = f"Quality {'by the clock' if measured else 'by computed steps'}"
    reports: list[BenchReport] = []
    looks: list[dict[str, dict[str, float | None]]] = []
    for prompt in captions(first + pairs, held_out=True)[first:]:
        wanted = BenchRequest(
            prompts=[prompt], seeds=[FIRST_SEED], steps=steps, rounds=1, caches=caches
        )
        with screen.progress():
            report = bench_bundle(opened, wanted, screen, screen.warn)
        exact = report.pictures[UNCACHED]
        looks.append({n: seen_by_eye(f, exact, lpips) for n, f in report.pictures.items()})
        report.pictures.clear()
        reports.append(report)
        found = merged(reports, looks, foretold)
        if peers is not None:
            found = with_peers(found, peers)
        text = write(out, "quality", title, found, *parts(found))
    plot(found, out / "quality.svg")
    typer.echo(text)


if __name__ == "__main__":
    typer.run(main)
