# SPDX-License-Identifier: Apache-2.0
"""`freewheel bench`: measure policies."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from .options import (
    BackendOption,
    BundleArgument,
    CudaGraphsOption,
    DebugOption,
    DeviceOption,
    ImageOption,
    JsonOption,
    OffloadOption,
    QuietOption,
    StepsOption,
    quiet_libraries,
)
from .ranks import end_job, join_job
from .screen import reporting

__all__ = ["bench"]


def bench(
    bundle: BundleArgument,
    prompts: Annotated[Path | None, typer.Option(help="Text file, one prompt per line.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="Prompt; repeatable.")] = None,
    seeds: Annotated[int, typer.Option(help="Seeds per prompt, counting from 0.")] = 1,
    cache: Annotated[
        list[str] | None,
        typer.Option("--cache", "--config_json", help="Config or policy; repeatable."),
    ] = None,
    rounds: Annotated[
        int,
        typer.Option(
            help="Timed runs of each setting; raised to a multiple of the prompt and seed pairs."
        ),
    ] = 3,
    steps: StepsOption = None,
    image: ImageOption = None,
    eager: Annotated[
        bool, typer.Option(help="Time diffusers eager on the same checkpoint too.")
    ] = False,
    backend: BackendOption = None,
    offload: OffloadOption = False,
    cuda_graphs: CudaGraphsOption = False,
    device: DeviceOption = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for bench.json, bench.md, videos and the contact sheet."),
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Write an HTML page (.html).")] = None,
    force: Annotated[
        bool, typer.Option(help="Run even configs made for a far greater size than the bundle's.")
    ] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure speed and quality of policies against the uncached run.

    Example: freewheel bench out/bundle --prompt "a red circle" --cache teacache --cache custom
    """
    with reporting("bench", as_json, quiet, debug) as screen:
        from ..bundle.reader import Bundle
        from ..compiler.forecast.geometry import check_geometry
        from ..compiler.sizes import size_of
        from ..core.extras import require_extra
        from ..core.output import check_file
        from ..runtime.model import DeviceOptions
        from ..runtime.settings import choose_setting
        from ..tuning.bench import BenchRequest, bench_bundle, read_prompts

        require_extra("metrics", "bench")
        if out is not None:
            require_extra("video", "bench --out")
        if report is not None:
            require_extra("report", "bench --report")
            check_file(report, "--report")
        texts = [*(prompt or []), *(read_prompts(prompts) if prompts else [])]
        quiet_libraries()
        opened = Bundle(bundle)
        for name in cache or opened.manifest.configs:
            chosen = choose_setting(opened, name, {}, lambda _: None)
            size = size_of(chosen.generation, steps=steps)
            warning = check_geometry(
                opened,
                name,
                chosen,
                size,
                force=force,
                backend=backend,
                gpu=device,
                offload=offload,
            )
            if warning is not None:
                screen.warn(warning)
        options = DeviceOptions(offload=offload, cuda_graphs=cuda_graphs, device=device)
        request = BenchRequest(
            prompts=texts,
            seeds=list(range(seeds)),
            caches=cache or None,
            rounds=rounds,
            steps=steps,
            eager=eager,
            backend=backend,
            options=options,
            out=out,
            image=image,
        )
        ranks = join_job(opened, request, device)
        with screen.progress():
            measured = bench_bundle(opened, request, screen, screen.warn, ranks)
        end_job(ranks)
        if report is not None and (ranks is None or ranks.leads):
            from ..tuning.provenance import provenance
            from ..tuning.report import write_bench_report

            facts = provenance(opened, measured.backend, ["freewheel", *sys.argv[1:]])
            write_bench_report(report, measured, facts)
            screen.note(f"report: {report}")
        screen.table("bench", measured.columns, measured.rows())
        screen.result(measured.as_dict(), [measured.markdown()])
