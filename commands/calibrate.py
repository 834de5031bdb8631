# SPDX-License-Identifier: Apache-2.0
"""`freewheel calibrate`: fit policies to a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..core.errors import RequestError, nearest
from .options import (
    BackendOption,
    BundleArgument,
    CudaGraphsOption,
    DebugOption,
    DeviceOption,
    GuidanceOption,
    JsonOption,
    OffloadOption,
    QuietOption,
    StepsOption,
    quiet_libraries,
)
from .ranks import end_job, join_job
from .screen import reporting

__all__ = ["calibrate"]

REMEDY = "run the same command again: it goes on from the runs that it has recorded"


def calibrate(
    bundle: BundleArgument,
    prompts: Annotated[Path, typer.Option(help="Text file, one prompt per line; one run each.")],
    out: Annotated[Path, typer.Option(help="File of configs to write (.json).")],
    speedup: Annotated[
        list[float] | None,
        typer.Option(help="Ideal speedup to write configs for; repeatable. Default 1.5 2 2.5 3 4."),
    ] = None,
    steps: StepsOption = None,
    guidance: GuidanceOption = None,
    first_seed: Annotated[int, typer.Option(help="Seed of the first prompt's noise.")] = 1000,
    history: Annotated[int, typer.Option(help="Residuals that solved mixes use, 1 to 6.")] = 6,
    preset: Annotated[
        str, typer.Option(help="quick, normal or thorough: values of --refine and --search.")
    ] = "normal",
    refine: Annotated[
        int | None,
        typer.Option(min=0, help="Prompts whose cached runs solved schedules are fitted on."),
    ] = None,
    search: Annotated[
        int | None,
        typer.Option(min=0, help="Rounds of moving the steps that solved schedules compute."),
    ] = None,
    objective: Annotated[
        str, typer.Option(help="What solved schedules are chosen by: mean or worst of the prompts.")
    ] = "mean",
    paths: Annotated[
        bool,
        typer.Option(
            "--paths",
            help="Look for solved schedules of all numbers of computed steps by dynamic programming "
            "over cached runs too.",
        ),
    ] = False,
    hold_out: Annotated[
        int,
        typer.Option(
            min=0,
            help="Last prompts of the file to fit nothing on and to run with every solved schedule: "
            "what `run --min-psnr` is kept by; 9 or more.",
        ),
    ] = 0,
    backend: BackendOption = None,
    offload: OffloadOption = False,
    cuda_graphs: CudaGraphsOption = False,
    device: DeviceOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Record uncached runs, and write a config per policy and speedup.

    Example: freewheel calibrate out/bundle --prompts prompts.txt --out calibration.json
    """
    with reporting("calibrate", as_json, quiet, debug, remedy=REMEDY) as screen:
        from ..bundle.reader import Bundle
        from ..core.output import check_file
        from ..runtime.model import DeviceOptions
        from ..runtime.summary import strip
        from ..tuning.bench import read_prompts
        from ..tuning.calibrate import calibrate as run_calibrate
        from ..tuning.calibration import SPEEDUPS, CalibrationRequest, save_calibration
        from ..tuning.checkpoints import Checkpoints
        from ..tuning.effort import PRESETS

        if preset not in PRESETS:
            raise RequestError(
                f"--preset '{preset}'", "is not known", nearest(preset, list(PRESETS))
            )
        chosen = PRESETS[preset]
        check_file(out, "--out")
        quiet_libraries()
        checkpoints = Checkpoints.beside(out)
        options = DeviceOptions(offload=offload, cuda_graphs=cuda_graphs, device=device)
        request = CalibrationRequest(
            prompts=read_prompts(prompts), first_seed=first_seed, steps=steps, guidance=guidance,
            history=history, backend=backend, options=options, speedups=speedup or SPEEDUPS,
            refine=chosen.refine if refine is None else refine,
            search=chosen.search if search is None else search, objective=objective,
            paths=paths, hold_out=hold_out, checkpoints=checkpoints,
        )  # fmt: skip
        opened = Bundle(bundle)
        ranks = join_job(opened, request, device)
        with screen.progress():
            found = run_calibrate(opened, request, screen, screen.warn, screen.note, ranks)
        if ranks is None or ranks.leads:
            save_calibration(found, out)
        end_job(ranks)
        checkpoints.remove()
        for name, reason in found.left_out.items():
            screen.warn(f"no config '{name}': {reason}")
        screen.table(
            "fits of TeaCache's polynomial",
            ["signal", "R²", "used"],
            [[n, round(f.r2, 3), not f.refusal] for n, f in found.fits.items()],
        )
        screen.table(
            "configs",
            ["config", "computed", "decisions", "dB from uncached"],
            [
                [
                    name,
                    "content decides" if t.computed is None else sum(t.computed),
                    "–" if t.computed is None else strip(t.computed),
                    t.distance_db,
                ]
                for name, t in found.told.items()
            ],
        )
        screen.note(
            "what a config without a figure costs in quality: freewheel bench "
            f"{bundle} --prompts {prompts} --cache '{out}#NAME'"
        )
        told = {name: vars(t) for name, t in found.told.items()}
        screen.result(
            {"out": str(out), "told": told, **found.as_dict()},
            [f"{out}#{n}" for n in found.configs],
        )
        screen.note(f"next: freewheel run {bundle} --cache '{out}#{next(iter(found.configs), '')}'")
