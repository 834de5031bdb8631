# SPDX-License-Identifier: Apache-2.0
"""`freewheel build`: compile a checkpoint into a bundle."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import (
    DebugOption,
    DeviceOption,
    JsonOption,
    QuietOption,
    backend_of,
    choice_of,
    precision_of,
)
from .screen import Screen, reporting

if TYPE_CHECKING:
    from ..compiler.cut.row import Row

__all__ = ["build"]

REMEDY = "run the same command again: finished graphs and engines are taken over"


def build(
    model: Annotated[str, typer.Argument(help="Diffusers folder, single file or hub id.")],
    out: Annotated[Path, typer.Option(help="Folder of the bundle to write.")],
    config: Annotated[
        list[str] | None,
        typer.Option(
            "--config",
            "--config_json",
            help="Caching config to carry; repeatable, the first is the default.",
        ),
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="Policy, or pair such as teacache+spectrum, to carry beside off and the configs'; "
            "repeatable; default: every policy."
        ),
    ] = None,
    trace_with: Annotated[
        str | None,
        typer.Option(
            help="Prompt with which to watch the pipeline of a model that has no row yet: what its "
            "transformer takes is learnt from the calls, and the cut is proved before it is built."
        ),
    ] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(
            help="tensorrt, tensorrt-rtx, openvino, onnxruntime or auto; repeatable, runs use the first."
        ),
    ] = None,
    precision: Annotated[
        str, typer.Option(help="Precision of the body: float32, bfloat16 or float16.")
    ] = "float32",
    weights: Annotated[str, typer.Option(help="inputs (block templates) or baked.")] = "inputs",
    group_blocks: Annotated[
        int | None,
        typer.Option(
            help="Blocks per engine with --weights baked; default: as many as 4 GiB of weights."
        ),
    ] = None,
    height: Annotated[
        str | None, typer.Option(help="Pixels that TensorRT engines serve: a size or min:opt:max.")
    ] = None,
    width: Annotated[str | None, typer.Option(help="Likewise.")] = None,
    frames: Annotated[
        str | None, typer.Option(help="Frames that they serve; default: what the configs ask for.")
    ] = None,
    batch: Annotated[
        str | None, typer.Option(help="Videos at once that they serve; default: 1.")
    ] = None,
    compute_capability: Annotated[
        list[str] | None,
        typer.Option(help="GPU to compile for with TensorRT-RTX, such as 8.9; repeatable."),
    ] = None,
    optimization_level: Annotated[
        int | None, typer.Option(min=0, max=5, help="Effort of TensorRT's builder, 0 to 5.")
    ] = None,
    workspace_mib: Annotated[
        int | None, typer.Option(min=1, help="Scratch memory that TensorRT's kernels may ask for.")
    ] = None,
    hardware_compatibility: Annotated[
        str | None,
        typer.Option(
            help="GPUs that TensorRT's engines serve too: ampere_plus or same_compute_capability."
        ),
    ] = None,
    tiling: Annotated[
        str | None, typer.Option(help="TensorRT's tiling across layers: fast, moderate or full.")
    ] = None,
    device: DeviceOption = None,
    preview: Annotated[
        str | None, typer.Option(help="TensorRT's preview features, by name, with commas between.")
    ] = None,
    build_cache: Annotated[
        Path | None,
        typer.Option(
            help="Folder of finished graphs and engines, and of TensorRT's timings, that bundles "
            "share; default: freewheel-cache beside the bundle."
        ),
    ] = None,
    with_text_encoder: Annotated[
        bool,
        typer.Option(
            "--with-text-encoder",
            help="Carry Wan's text encoder as an engine, for programs without Python.",
        ),
    ] = False,
    with_vae: Annotated[
        bool,
        typer.Option(
            "--with-vae",
            help="Carry Wan's VAE decoder too, at the size that the first config names.",
        ),
    ] = False,
    pipeline: Annotated[
        str | None,
        typer.Option(
            help="Diffusers folder or hub id with text encoder, VAE and configs, where MODEL is a "
            "transformer alone."
        ),
    ] = None,
    low_noise_model: Annotated[
        str | None,
        typer.Option(
            help="Transformer of the low noise levels, where MODEL is that of the high ones alone "
            "(Wan 2.2)."
        ),
    ] = None,
    variant: Annotated[
        str | None,
        typer.Option(
            help="Which of several sets of weights the folders have, such as fp16 or bf16."
        ),
    ] = None,
    float8: Annotated[
        str,
        typer.Option(
            help="keep (weights in float8_e4m3fn stay so, where every backend takes them) or convert "
            "(to the graphs' own dtypes, which LoRAs need)."
        ),
    ] = "keep",
    sequence_parallel: Annotated[
        bool,
        typer.Option(
            "--sequence-parallel",
            help="Carry graphs for several processes that share one sequence, cut at the attentions.",
        ),
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Commit of a hub checkpoint.")] = None,
    force: Annotated[bool, typer.Option(help="Replace an existing bundle.")] = False,
    resume_engines: Annotated[
        bool,
        typer.Option(
            "--resume-engines",
            help="Only compile the engines of --backend into the bundle at --out; MODEL is not read.",
        ),
    ] = False,
    dump_passes: Annotated[
        Path | None, typer.Option(help="Write each graph after each pass here.")
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="Say what would be built, and stop.")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Compile a checkpoint into a bundle.

    Example: freewheel build models/shapes_wan --out out/bundle
    """
    with (
        reporting("build", as_json, quiet, debug, remedy=REMEDY) as screen,
        ExitStack() as until_done,
    ):
        from ..bundle.files import cache_beside
        from ..compiler.build import build as run_build
        from ..compiler.checkpoints.authors_folder import find_authors_folder
        from ..compiler.forecast.build import describe_plan, render_plan
        from ..compiler.lightx2v import hollow_pipeline, written_pipeline
        from ..compiler.plan import plan
        from ..compiler.profiles import BuildSizes, parse_range
        from ..compiler.request import BuildRequest
        from ..compiler.resume_engines import left_to_gpus
        from ..compiler.resume_engines import resume_engines as resume
        from ..engines import Target, choose_gpu
        from ..engines.base import StreamedBackend
        from ..runtime.settings import config_entries, other_size

        precision = precision_of(precision)
        backends = [
            backend_of(name, precision, screen, to_build=True) for name in backend or ["auto"]
        ]
        if device is not None:
            on_gpus: list[Any] = [one for one in backends if isinstance(one, StreamedBackend)]
            for one in on_gpus or backends[:1]:
                choose_gpu(one, device)
        if pipeline is None and not resume_engines and Path(model).is_dir():
            found = find_authors_folder(Path(model))
            if found is not None:
                parts = (
                    until_done.enter_context(hollow_pipeline(found))
                    if dry_run
                    else written_pipeline(Path(model), found, build_cache or cache_beside(out))
                )
                model, pipeline = str(found.transformer), str(parts)
                if found.low_noise is not None and low_noise_model is None:
                    low_noise_model = str(found.low_noise)
        sizes = {"height": height, "width": width, "frames": frames, "batch": batch}
        options = {
            "builder_optimization_level": optimization_level,
            "workspace_bytes": None if workspace_mib is None else workspace_mib << 20,
            "hardware_compatibility_level": hardware_compatibility,
            "tiling_optimization_level": tiling,
            "preview_features": preview,
        }
        target = Target(
            compute_capabilities=tuple(compute_capability or ()),
            options={n: v for n, v in options.items() if v is not None},
        )
        request = BuildRequest(
            model=model,
            out=out,
            backends=backends,
            configs=config_entries(config or ["off"], screen.warn),
            policies=policy,
            row=None if trace_with is None else _watched(model, revision, trace_with, screen),
            precision=precision,  # type: ignore[arg-type]  # one of the three
            weights=choice_of("--weights", weights, ("inputs", "baked")),  # type: ignore[arg-type]
            group_blocks=group_blocks,
            revision=revision,
            replace=force,
            target=target,
            sizes=BuildSizes(**{n: parse_range(f"--{n}", t) for n, t in sizes.items() if t}),
            cache=None if dry_run else build_cache or cache_beside(out),
            dump=dump_passes,
            with_text_encoder=with_text_encoder,
            with_vae=with_vae,
            pipeline=pipeline,
            low_noise=low_noise_model,
            variant=variant,
            float8=choice_of("--float8", float8, ("keep", "convert")),  # type: ignore[arg-type]
            sequence_parallel=sequence_parallel,
        )
        if resume_engines:
            with screen.progress():
                whole = resume(
                    out, backends, target, request.sizes, build_cache or cache_beside(out), screen
                )
            built = [e.backend for e in whole.engines]
            screen.result({"bundle": str(out), "backends": built}, [str(out)])
            return
        if dry_run:
            described = describe_plan(plan(request))
            screen.result(described, render_plan(described))
            return
        with screen.progress():
            began = time.perf_counter()
            planned = plan(request)
            planning = round(time.perf_counter() - began, 3)
            report = run_build(planned, screen)
        seconds = {"plan": planning, **report.seconds}
        for text in report.notes:
            screen.note(text)
        for name, entry in report.manifest.configs.items():
            other = other_size(report.manifest, entry.generation)
            if other is not None:
                screen.warn(f"config '{name}' {other}: runs that name it take its size")
        screen.table("phases", ["phase", "seconds"], list(seconds.items()))
        left = left_to_gpus(report.manifest)
        data = {
            "bundle": str(out),
            "backends": [b.name for b in backends],
            "precision": precision,
            "weights": report.manifest.weights,
            "seconds": seconds,
            "bytes": report.bytes,
            "written_bytes": report.written_bytes,
            "notes": list(report.notes),
            "left_to_gpus": left,
        }
        screen.result(data, [str(out)])
        if left:
            screen.note(
                f"TensorRT would compile {len(left)} graphs of it on a machine with a GPU: "
                f"freewheel build {model} --out {out} --resume-engines --backend tensorrt"
            )
        screen.note(
            f"{report.bytes / 1e6:.1f} MB, {report.written_bytes / 1e6:.1f} MB of them written; "
            f"next: freewheel run {out} --prompt '…' --out video.mp4"
        )


def _watched(model: str, revision: str | None, text: str, screen: Screen) -> Row | None:
    """Learn the row of a model that the table has none of, and print it."""
    from ..compiler.checkpoints.checkpoint import open_checkpoint
    from ..compiler.cut.learn import watched_row
    from ..compiler.cut.models import row_of
    from ..compiler.cut.spell import spelled

    checkpoint = open_checkpoint(model, revision)
    if row_of(checkpoint.transformer_class) is not None:
        screen.note(f"--trace-with is left out: '{checkpoint.transformer_class}' has a row")
        return None
    row = watched_row(checkpoint.transformer_class, checkpoint.config, checkpoint.pipeline, text)
    screen.note(f"its row, for compiler/cut/models.py:\n{spelled(row)}")
    return row
