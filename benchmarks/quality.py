# SPDX-License-Identifier: Apache-2.0
r"""Quality of every policy at the same speedups, on held-out prompts.

    freewheel build models/shapes_wan --out out/demo/bundle --config shapes_wan_off \
        --config firstblock+dmd --config seacache+spectrum
    python benchmarks/quality.py out/demo/bundle --out out/bench
    python benchmarks/quality.py out/demo/bundle --measured --out out/bench/measured

Calibrates on training captions, then runs each policy's setting for each speedup on captions that
neither training nor calibration saw, beside the uncached run of the same seed. PSNR and SSIM of decoded
frames, mean and worst; measured speedup as in `freewheel bench`. Each setting is also replayed on one
recorded run of a training caption: the reuse error foretold there, and how its ranking correlates with
the measured one.

Speedups are ideal ones, steps over computed steps. With ``--measured`` they are those of the clock: a
few runs ahead tell what a reused step costs, and so how few steps may be computed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from scipy.stats import spearmanr

from freewheel.bundle.reader import Bundle
from freewheel.commands.screen import Screen
from freewheel.configs.load import load_config, read_configs
from freewheel.policies.custom import DAMPED, PUBLISHED, CustomConfig
from freewheel.policies.setting import CacheSetting, GuardSetting
from freewheel.runtime.pipeline.generate import Generator
from freewheel.runtime.pipeline.request import GenerationRequest
from freewheel.runtime.settings import choose_setting
from freewheel.tuning.bench import BenchReport, BenchRequest, bench_bundle
from freewheel.tuning.calibrate import CalibrationRequest, calibrate, save_calibration
from freewheel.tuning.replay import replay
from freewheel.tuning.trace import Trace, TraceRecorder

MODEL = Path(__file__).resolve().parent.parent / "models" / "shapes_wan"
SPEEDUPS = (2.0, 2.5, 3.0, 4.0)
PROBE_ROUNDS = 8
EVEN: dict[str, dict[str, Any]] = {
    "taylorseer": {"interval": 1000, "order": 1},
    "hermite": {"interval": 1000},
    "foca": {"interval": 1000},
    "dmd": {"interval": 1000},
    "spectrum": {"warmup": 1, "window": 1000.0},
}
"""Forecasts that are compared at even schedules → parameters that compute nothing by themselves."""

BY_CONTENT = {
    "easycache": GuardSetting(first_exact=7, last_exact=2),
    "firstblock": GuardSetting(),
    "seacache": GuardSetting(first_exact=1, last_exact=1, max_consecutive=2),
    "dicache": GuardSetting(),
    "firstblock+dmd": GuardSetting(),
    "seacache+spectrum": GuardSetting(first_exact=1, last_exact=1),
}
"""Policies and pairs whose thresholds are found by replay → their guards."""

Ideals = Mapping[float, float]
"""Steps over computed steps, by the speedup in the heading."""

FIRST_SEED = 0


def captions(count: int, *, held_out: bool) -> list[str]:
    """Return captions of the demo model that training never saw, or saw."""
    sys.path.insert(0, str(MODEL))
    from generate import held_out_pairs, tuning_pairs

    pairs = held_out_pairs(count) if held_out else tuning_pairs(count)
    return [str(pair.caption) for pair in pairs]


def settings(calibration: Path, steps: int, ideals: Ideals) -> dict[str, CacheSetting]:
    """Return one setting per policy and speedup, by ``policy speedup``."""
    configs = read_configs(calibration)
    found: dict[str, CacheSetting] = {}
    for speedup, ideal in ideals.items():
        for policy in ("teacache", "custom", "magcache", "sencache", "solved"):
            config = configs.get(f"{policy}_{ideal:g}x")
            if config is not None:
                found[f"{policy} {speedup:g}"] = config.setting()
            if isinstance(config, CustomConfig):
                for name, form in (("custom", DAMPED), ("custom published", PUBLISHED)):
                    found[f"{name} {speedup:g}"] = config.model_copy(update=form).setting()
        for policy in EVEN:
            found[f"{policy} {speedup:g}"] = evenly(policy, ideal, steps)
    for codebook in ("steps_30_slow", "steps_30_fast", "steps_100"):
        config = load_config("adacache").model_copy(update={"codebook": _codebook(codebook)})
        found[f"adacache {codebook}"] = config.setting()
    return found


def evenly(policy: str, speedup: float, steps: int) -> CacheSetting:
    """Return a forecast of `EVEN` that computes steps / speedup steps, as evenly as can be."""
    return CacheSetting(
        policy=policy,
        parameters=EVEN[policy],
        guard=GuardSetting(exact_steps=even_steps(int(steps // speedup), steps)),
    )


def even_steps(count: int, steps: int) -> list[int]:
    """Return ``count`` steps, spread as evenly as can be from step 0 on."""
    return sorted({round(i * steps / count) for i in range(count)})


def _codebook(name: str) -> Any:
    from freewheel.policies.adacache import CODEBOOKS

    return CODEBOOKS[name]


def recorded(bundle: Bundle, steps: int, prompt: str) -> Trace:
    """Return an uncached run with everything that policies look at."""
    recorder = TraceRecorder(wants_signals=True)
    base = choose_setting(bundle, None, {}, lambda text: None)
    uncached = choose_setting(bundle, "off", {}, lambda text: None).cache
    Generator(bundle).generate(
        GenerationRequest(prompt=prompt, cache=uncached, defaults=base.generation, steps=steps, seed=1),
        recorder=recorder,
    )  # fmt: skip
    return recorder.trace()


def content_settings(
    trace: Trace, steps: int, ideals: Mapping[str, Ideals], policies: Container[str]
) -> Iterator[tuple[str, CacheSetting]]:
    """Yield what decides by content at each speedup: thresholds by replay.

    Of pairs those whose graphs the bundle has.
    """
    for policy, guard in BY_CONTENT.items():
        if policy not in policies:
            continue
        tried = [
            CacheSetting(policy=policy, parameters={"threshold": round(float(t), 4)}, guard=guard)
            for t in np.geomspace(0.005, 2.0, 60)
        ]
        counts = [replay(trace, setting).computed_steps for setting in tried]
        for speedup, ideal in ideals[policy].items():
            wanted = steps // ideal
            best = min(range(len(tried)), key=lambda i: abs(counts[i] - wanted))
            yield f"{policy} {speedup:g}", tried[best]


def measured_ideals(bundle: Bundle, trace: Trace, steps: int, screen: Screen) -> dict[str, Ideals]:
    """Return which ideal speedups the clock makes `SPEEDUPS` of, by policy.

    A run of S steps, c of them computed, takes c + (S - c) r computed steps' time, where r is what a
    reused step costs; `taylorseer` stands for all that decide by tables, counters or timesteps.
    """
    four = {4.0: 4.0}
    wanted = dict.fromkeys(BY_CONTENT, four)
    caches = dict(content_settings(trace, steps, wanted, bundle.manifest.policies))
    caches["taylorseer 4"] = evenly("taylorseer", 4, steps)
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
        found[entry["name"].split()[0]] = ideals
        typer.echo(f"{entry['name']}: a reused step costs {cost:.3f} of a computed one; {ideals}")
    return found


def merged(reports: Sequence[BenchReport], foretold: Mapping[str, float]) -> dict[str, Any]:
    """Return one table from those of single pairs, beside the errors foretold of each setting."""
    rows = []
    for same in zip(*(r.entries for r in reports), strict=True):
        psnr = [e["psnr_mean"] for e in same if e["psnr_mean"] is not None]
        ssim = [e["ssim_mean"] for e in same if e["ssim_mean"] is not None]
        rows.append(
            {
                "name": same[0]["name"],
                "computed_steps": float(np.mean([e["computed_steps"] for e in same])),
                "speedup": float(np.median([e["speedup"] for e in same])),
                "psnr_mean": float(np.mean(psnr)) if psnr else None,
                "psnr_worst": min(psnr, default=None),
                "ssim_mean": float(np.mean(ssim)) if ssim else None,
                "ssim_worst": min(ssim, default=None),
                "psnr": psnr,
                "foretold_error": foretold.get(same[0]["name"]),
            }
        )
    known = [(r["foretold_error"], r["psnr_mean"]) for r in rows if r["foretold_error"] is not None]
    return {
        "steps": reports[0].steps,
        "pairs": len(reports),
        "rank_correlation": -float(spearmanr(*zip(*known, strict=True)).statistic),
        "rows": rows,
    }


def markdown(found: dict[str, Any]) -> str:
    """Return the table, one block of rows per speedup."""
    lines = [
        "| setting | computed | speedup | PSNR dB | worst | SSIM | worst | foretold error |",
        "|---" + "|--:" * 7 + "|",
    ]
    for r in found["rows"]:
        if r["psnr_mean"] is None:
            continue
        lines.append(
            f"| {r['name']} | {r['computed_steps']:.1f} | {r['speedup']:.2f} | {r['psnr_mean']:.1f} | "
            f"{r['psnr_worst']:.1f} | {r['ssim_mean']:.4f} | {r['ssim_worst']:.4f} | {r['foretold_error']:.4f} |"
        )
    lines += ["", f"Rank correlation of foretold error and PSNR: {found['rank_correlation']:.2f}."]
    return "\n".join(lines)


def main(
    bundle: Annotated[Path, typer.Argument(help="Bundle of the demo model.")],
    out: Annotated[Path, typer.Option(help="Folder for the tables.")],
    calibration: Annotated[Path | None, typer.Option(help="Use this one.")] = None,
    pairs: Annotated[int, typer.Option(help="Held-out captions, one seed each.")] = 16,
    first: Annotated[int, typer.Option(help="Index of the first held-out caption.")] = 0,
    prompts: Annotated[int, typer.Option(help="Captions to calibrate on.")] = 16,
    steps: Annotated[int, typer.Option(help="Denoise steps.")] = 50,
    only: Annotated[str, typer.Option(help="Policies whose name begins so, by commas.")] = "",
    measured: Annotated[bool, typer.Option(help="Speedups are those of the clock.")] = False,
) -> None:
    """Measure; the tables are written after every pair."""
    screen = Screen(as_json=False, quiet=False)
    opened = Bundle(bundle)
    out.mkdir(parents=True, exist_ok=True)
    seen = captions(max(prompts, 1), held_out=False)
    trace = recorded(opened, steps, seen[0])
    ideals: dict[str, Ideals] = {p: {x: x for x in SPEEDUPS} for p in ("taylorseer", *BY_CONTENT)}
    if measured:
        ideals = measured_ideals(opened, trace, steps, screen)
    tabled = ideals["taylorseer"]
    if calibration is None:
        calibration = out / "calibration.json"
        request = CalibrationRequest(seen, speedups=list(tabled.values()), steps=steps)
        with screen.progress():
            save_calibration(calibrate(opened, request, screen, screen.warn), calibration)
    by_content = content_settings(trace, steps, ideals, opened.manifest.policies)
    caches = settings(calibration, steps, tabled) | dict(by_content)
    kept = tuple(part for part in only.split(",") if part) or ("",)
    caches = {n: s for n, s in caches.items() if n.startswith(kept)}
    foretold = {name: replay(trace, cache).error for name, cache in caches.items()}
    reports: list[BenchReport] = []
    for prompt in captions(first + pairs, held_out=True)[first:]:
        wanted = BenchRequest(
            prompts=[prompt], seeds=[FIRST_SEED], steps=steps, rounds=1, caches=caches
        )
        with screen.progress():
            reports.append(bench_bundle(opened, wanted, screen, screen.warn))
        found = merged(reports, foretold)
        (out / "quality.json").write_text(json.dumps(found, indent=1))
        (out / "quality.md").write_text(markdown(found) + "\n")
    typer.echo((out / "quality.md").read_text())


if __name__ == "__main__":
    typer.run(main)
