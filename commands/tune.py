# SPDX-License-Identifier: Apache-2.0
"""`freewheel tune`: find a setting."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..core.errors import RequestError
from .options import (
    BackendOption,
    BundleArgument,
    CudaGraphsOption,
    DebugOption,
    DeviceOption,
    JsonOption,
    OffloadOption,
    QuietOption,
    StepsOption,
    quiet_libraries,
)
from .ranks import end_job, join_job
from .screen import reporting

__all__ = ["tune"]


def tune(
    bundle: BundleArgument,
    prompts: Annotated[Path, typer.Option(help="Text file, one prompt per line.")],
    out: Annotated[Path, typer.Option(help="Config to write (.json).")],
    target_speedup: Annotated[
        float | None, typer.Option(help="Find the best quality at this measured speedup.")
    ] = None,
    min_psnr: Annotated[
        float | None, typer.Option(help="Find the fastest of at least this PSNR, dB.")
    ] = None,
    min_ssim: Annotated[
        float | None, typer.Option(help="Find the fastest of at least this SSIM.")
    ] = None,
    criterion: Annotated[
        str, typer.Option(help="Whether the mean over prompts counts, or the worst.")
    ] = "mean",
    calibration: Annotated[
        Path | None, typer.Option(help="File that `calibrate` wrote, to search as well.")
    ] = None,
    traces: Annotated[
        int, typer.Option(help="Prompts to record and replay; the others confirm.")
    ] = 2,
    confirm: Annotated[int, typer.Option(help="Candidates to confirm by real runs.")] = 8,
    rounds: Annotated[int, typer.Option(help="Timed runs of each candidate, at least.")] = 3,
    steps: StepsOption = None,
    backend: BackendOption = None,
    offload: OffloadOption = False,
    cuda_graphs: CudaGraphsOption = False,
    device: DeviceOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Find the setting for a wanted speedup or quality, and write it as a config.

    Example: freewheel tune out/bundle --prompts prompts.txt --target-speedup 2 --out tuned.json
    """
    with reporting("tune", as_json, quiet, debug) as screen:
        from ..core.extras import require_extra

        require_extra("metrics", "tune")
        from ..bundle.reader import Bundle
        from ..core.output import check_file
        from ..runtime.model import DeviceOptions
        from ..tuning.bench import read_prompts
        from ..tuning.tune import Goal, TuneRequest, save_config
        from ..tuning.tune import tune as run_tune

        check_file(out, "--out")
        options = DeviceOptions(offload=offload, cuda_graphs=cuda_graphs, device=device)
        request = TuneRequest(
            goal=Goal(target_speedup, min_psnr, min_ssim, criterion),
            prompts=read_prompts(prompts),
            traces=traces,
            calibration=calibration,
            confirm=confirm,
            rounds=rounds,
            steps=steps,
            backend=backend,
            options=options,
        )
        quiet_libraries()
        opened = Bundle(bundle)
        ranks = join_job(opened, request, device)
        with screen.progress():
            report = run_tune(opened, request, screen, screen.warn, ranks)
        end_job(ranks)
        screen.table(
            "confirmed by real runs (* none is faster and better, < chosen)",
            report.columns,
            report.table(),
        )
        if report.chosen is None:
            raise RequestError(
                "tune",
                "found no setting that reaches the goal",
                "ask for less, give --calibration, or raise --confirm",
            )
        if ranks is None or ranks.leads:
            save_config(report.configs[report.chosen], out)
        screen.result({"out": str(out), **report.as_dict()}, [f"{out}: {report.chosen}"])
