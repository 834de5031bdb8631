# SPDX-License-Identifier: Apache-2.0
"""Quality of every policy at the same numbers of computed steps, on held-out prompts.

    freewheel build models/shapes_wan --out out/demo/bundle --config shapes_wan_off
    python benchmarks/quality.py out/demo/bundle --out out/bench

Calibrates on training captions, then runs each policy's setting for each ideal speedup on captions
that neither training nor calibration saw, beside the uncached run of the same seed. PSNR and SSIM of
decoded frames, mean and worst; measured speedup as in `freewheel bench`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from freewheel.bundle.reader import Bundle
from freewheel.configs.load import load_config, read_configs
from freewheel.configs.policy_configs import Custom
from freewheel.configs.setting import CacheSetting, GuardSetting
from freewheel.console import Screen
from freewheel.runtime.bench import BenchRequest, bench_bundle
from freewheel.tuning.calibrate import CalibrationRequest, calibrate, save_calibration

MODEL = Path(__file__).resolve().parent.parent / "models" / "shapes_wan"
SPEEDUPS = (2.0, 2.5, 3.0, 4.0)
FIRST_SEED = 0


def captions(count: int, *, held_out: bool) -> list[str]:
    """Return captions of the demo model that training never saw, or saw."""
    sys.path.insert(0, str(MODEL))
    from generate import held_out_pairs, tuning_pairs

    pairs = held_out_pairs(count) if held_out else tuning_pairs(count)
    return [str(pair.caption) for pair in pairs]


def settings(calibration: Path, steps: int) -> dict[str, CacheSetting]:
    """Return one setting per policy and speedup, by ``policy speedup``."""
    configs = read_configs(calibration)
    found: dict[str, CacheSetting] = {}
    for speedup in SPEEDUPS:
        for policy in ("teacache", "custom", "magcache", "solved"):
            config = configs.get(f"{policy}_{speedup:g}x")
            if config is not None:
                found[f"{policy} {speedup:g}"] = config.setting()
            if isinstance(config, Custom):
                published = config.model_copy(update={"trend": 1.0, "trend_decay": 1.0})
                found[f"custom published {speedup:g}"] = published.setting()
        found[f"taylorseer {speedup:g}"] = evenly(speedup, steps)
    for codebook in ("steps_30_slow", "steps_30_fast", "steps_100"):
        config = load_config("adacache").model_copy(update={"codebook": _codebook(codebook)})
        found[f"adacache {codebook}"] = config.setting()
    return found


def evenly(speedup: float, steps: int) -> CacheSetting:
    """Return TaylorSeer of order 1 that computes steps / speedup steps, as evenly as can be."""
    count = int(steps // speedup)
    exact = sorted({round(i * steps / count) for i in range(count)})
    return CacheSetting(
        policy="taylorseer",
        parameters={"interval": 1000, "order": 1},
        guard=GuardSetting(exact_steps=exact),
    )


def _codebook(name: str) -> Any:
    from freewheel.configs.policy_configs import CODEBOOKS

    return CODEBOOKS[name]


def main(
    bundle: Annotated[Path, typer.Argument(help="Bundle of the demo model.")],
    out: Annotated[Path, typer.Option(help="Folder for the tables.")],
    calibration: Annotated[Path | None, typer.Option(help="Use this one.")] = None,
    pairs: Annotated[int, typer.Option(help="Held-out captions, one seed each.")] = 16,
    prompts: Annotated[int, typer.Option(help="Captions to calibrate on.")] = 16,
    steps: Annotated[int, typer.Option(help="Denoise steps.")] = 50,
) -> None:
    """Measure."""
    screen = Screen(as_json=False, quiet=False)
    opened = Bundle(bundle)
    out.mkdir(parents=True, exist_ok=True)
    if calibration is None:
        calibration = out / "calibration.json"
        request = CalibrationRequest(captions(prompts, held_out=False), steps=steps)
        with screen.progress():
            save_calibration(calibrate(opened, request, screen, screen.warn), calibration)
    wanted = BenchRequest(
        prompts=captions(pairs, held_out=True), seeds=[FIRST_SEED], steps=steps, rounds=1,
        caches=settings(calibration, steps),
    )  # fmt: skip
    with screen.progress():
        report = bench_bundle(opened, wanted, screen, screen.warn)
    (out / "quality.json").write_text(json.dumps(report.as_dict(), indent=1))
    (out / "quality.md").write_text(report.markdown() + "\n")
    typer.echo(report.markdown())


if __name__ == "__main__":
    typer.run(main)
