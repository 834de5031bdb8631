# SPDX-License-Identifier: Apache-2.0
"""The command line: parse, build one request, call one function, render."""

from __future__ import annotations

import os
import re
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from freewheel import __version__
from freewheel.configs.errors import ConfigError, FreewheelError, RequestError
from freewheel.console import Screen

PATH_LIKE = {"cache", "config", "lora", "model"}
"""Parameters that may be a path or a name, and are read as text."""


class UsageError(FreewheelError):
    """A command line that can't be parsed."""

    code, exit_code = "usage", 2


class Bug(FreewheelError):
    """A failure that nobody expected; its traceback is printed too."""

    code, exit_code = "bug", 70


class Command(TyperCommand):
    """A command whose paths may begin with ``~``, which shells leave alone in ``--out=~/x``."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]  # typer's own base of Context
        """Parse the command line and expand ``~`` in every path."""
        rest = super().parse_args(ctx, args)
        for name, value in ctx.params.items():
            if isinstance(value, Path) or name in PATH_LIKE:
                ctx.params[name] = _expanded(value)
        return rest


class Commands(TyperGroup):
    """The group of commands: ``--json`` prints an object for usage errors too."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run a command line; see `typer.core.TyperGroup.main`."""
        arguments = sys.argv[1:] if args is None else list(args)
        run = partial(
            super().main, arguments, prog_name, complete_var,
            windows_expand_args=windows_expand_args, **extra,
        )  # fmt: skip
        if "--json" not in arguments:
            return run(standalone_mode=standalone_mode)
        try:
            code = run(standalone_mode=False)
        except typer.TyperException as error:
            context = getattr(error, "ctx", None)
            command = context.command_path if context is not None else "freewheel"
            fault = UsageError(command, error.format_message().rstrip("."), f"see {command} --help")
            Screen(as_json=True).error(fault)
            raise SystemExit(fault.exit_code) from None
        raise SystemExit(code or 0)


def _expanded(value: Any) -> Any:
    """Replace a leading ``~`` of a path, a text, or each of a list."""
    if isinstance(value, list):
        return [_expanded(v) for v in value]
    if not isinstance(value, str | Path):
        return value
    # Path.expanduser raises where no such user is; such a name may be a file's.
    return type(value)(os.path.expanduser(value))  # noqa: PTH111


app = typer.Typer(
    name="freewheel",
    cls=Commands,
    help="Compile diffusion transformers at their cache boundaries, and run them with a cache policy per request.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

BundleArgument = Annotated[Path, typer.Argument(help="Folder that `build` wrote.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
QuietOption = Annotated[bool, typer.Option("-q", "--quiet", help="No progress and no tables.")]
DebugOption = Annotated[bool, typer.Option(help="Show tracebacks of expected errors.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="Override a parameter: key=value; repeatable.")
]
CacheOption = Annotated[
    str | None,
    typer.Option("--cache", "--config_json", help="Config name or file, policy name, or off."),
]


command = partial(app.command, cls=Command)

REMEDIES = {"build": "run the same command again: finished graphs and engines are taken over"}
"""Command → what to do after it was interrupted."""


def _print_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"freewheel {__version__}\n")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version, and stop.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Take the options that come before a command."""


@contextmanager
def _screen(command: str, as_json: bool, quiet: bool, debug: bool) -> Iterator[Screen]:
    """Turn expected errors into one message and their exit code."""
    screen = Screen(as_json=as_json, quiet=quiet or as_json)
    try:
        yield screen
    except FreewheelError as error:
        if debug:
            traceback.print_exc()
        screen.error(error)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        screen.error(
            FreewheelError(command, "was interrupted", REMEDIES.get(command, "run it again"))
        )
        raise typer.Exit(130) from None


@command()
def build(
    model: Annotated[str, typer.Argument(help="Diffusers folder or hub id.")],
    out: Annotated[Path, typer.Option(help="Folder of the bundle to write.")],
    config: Annotated[
        list[str] | None,
        typer.Option(
            "--config",
            "--config_json",
            help="Caching config to carry; repeatable, the first is the default.",
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
    with _screen("build", as_json, quiet, debug) as screen:
        from freewheel.bundle.files import cache_beside
        from freewheel.bundle.staging import check_target
        from freewheel.compiler.build import BuildRequest, plan
        from freewheel.compiler.build import build as run_build
        from freewheel.compiler.forecast_build import render_plan
        from freewheel.compiler.profiles import BuildSizes, parse_range
        from freewheel.compiler.resume_engines import left_to_gpus
        from freewheel.compiler.resume_engines import resume_engines as resume
        from freewheel.engines import Target
        from freewheel.runtime.settings import config_entries

        precision = _precision(precision)
        backends = [
            _backend(name, precision, screen, to_build=True) for name in backend or ["auto"]
        ]
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
            precision=precision,  # type: ignore[arg-type]  # one of the three
            weights=_choice("--weights", weights, ("inputs", "baked")),  # type: ignore[arg-type]
            group_blocks=group_blocks,
            revision=revision,
            replace=force,
            target=target,
            sizes=BuildSizes(**{n: parse_range(f"--{n}", t) for n, t in sizes.items() if t}),
            cache=build_cache or cache_beside(out),
            dump=dump_passes,
            with_text_encoder=with_text_encoder,
            with_vae=with_vae,
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
            check_target(out, replace=force)
            planned = plan(request)
            screen.result(planned, render_plan(planned))
            return
        with screen.progress():
            report = run_build(request, screen)
        screen.table("phases", ["phase", "seconds"], list(report.seconds.items()))
        data = {
            "bundle": str(out),
            "backends": [b.name for b in backends],
            "precision": precision,
            "weights": report.manifest.weights,
            "seconds": dict(report.seconds),
            "bytes": report.bytes,
            "written_bytes": report.written_bytes,
        }
        screen.result(data, [str(out)])
        screen.note(
            f"{report.bytes / 1e6:.1f} MB, {report.written_bytes / 1e6:.1f} MB of them written; "
            f"next: freewheel run {out} --prompt '…' --out video.mp4"
        )
        left = left_to_gpus(report.manifest)
        if left:
            screen.note(
                f"TensorRT would compile {len(left)} graphs of it on a machine with a GPU "
                f"({', '.join(left)}): freewheel build {model} --out {out} --resume-engines "
                "--backend tensorrt"
            )


@command()
def run(
    bundle: BundleArgument,
    prompt: Annotated[str, typer.Option(help="What to show.")],
    out: Annotated[Path, typer.Option(help="Video to write: .mp4, .gif or .png.")],
    negative_prompt: Annotated[str, typer.Option(help="What not to show.")] = "",
    cache: CacheOption = None,
    set_: SetOption = None,
    steps: Annotated[int | None, typer.Option(help="Denoise steps.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the initial noise.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; 1 turns it off.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    frames: Annotated[int | None, typer.Option(help="Frames of the video.")] = None,
    image: Annotated[Path | None, typer.Option(help="First frame, for image-to-video.")] = None,
    lora: Annotated[
        list[str] | None, typer.Option(help="FILE[:scale] to merge at load; repeatable.")
    ] = None,
    backend: Annotated[
        str | None, typer.Option(help="Backend; default: the bundle's first.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="Diffusers folder, if the bundle lacks the pipeline.")
    ] = None,
    offload: Annotated[
        bool, typer.Option(help="Keep the blocks' weights in host memory, two blocks on the GPU.")
    ] = False,
    cuda_graphs: Annotated[
        bool, typer.Option(help="Replay steps as CUDA graphs (TensorRT).")
    ] = False,
    device: Annotated[
        int | None, typer.Option(help="Index of the GPU; default: the current one.")
    ] = None,
    check_finite: Annotated[
        bool, typer.Option(help="Stop at the first step that makes values that are not finite.")
    ] = True,
    record: Annotated[Path | None, typer.Option(help="Write a trace (.npz).")] = None,
    record_tokens: Annotated[
        int | None, typer.Option(help="Tokens of each frame to record.")
    ] = None,
    record_signals: Annotated[
        bool, typer.Option(help="Record the modulated input and the first block's residual too.")
    ] = False,
    report: Annotated[
        Path | None,
        typer.Option(help="Write an HTML page (.html); runs the request uncached as well."),
    ] = None,
    fps: Annotated[int, typer.Option(help="Frames per second.")] = 8,
    force: Annotated[
        bool, typer.Option(help="Run even where the forecast says that memory will not do.")
    ] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Make a video from a prompt.

    Example: freewheel run out/bundle --prompt "a red circle" --cache teacache --out video.mp4
    """
    with _screen("run", as_json, quiet, debug) as screen:
        from freewheel.bundle.reader import Bundle
        from freewheel.compiler.fit import check_fit
        from freewheel.compiler.geometry import check_geometry
        from freewheel.compiler.sizes import size_of
        from freewheel.configs.output import check_file
        from freewheel.runtime.forecast import forecast
        from freewheel.runtime.generate import GenerationRequest, Generator
        from freewheel.runtime.model import DeviceOptions
        from freewheel.runtime.settings import choose_setting, stretch_warning
        from freewheel.runtime.trace import TraceRecorder
        from freewheel.runtime.video import check_output, write_video

        check_output(out, fps)
        for flag, path in (("--record", record), ("--report", report)):
            if path is not None:
                check_file(path, flag)
            if path == out:
                raise RequestError(f"{flag} '{path}'", "is --out's file too", "name another")
        if record is not None and report is not None:
            raise RequestError("--record", "can't be given with --report", "make two runs")
        if record_tokens is not None and record_tokens < 1:
            raise RequestError(f"--record-tokens {record_tokens}", "is below 1", "use 64")
        _quiet_libraries()
        opened = Bundle(bundle)
        chosen = choose_setting(opened, cache, _pairs(set_), screen.warn)
        request = GenerationRequest(
            prompt=prompt, negative_prompt=negative_prompt, cache=chosen.cache, defaults=chosen.generation,
            steps=steps, height=height, width=width, frames=frames, guidance_scale=guidance, seed=seed,
            image=image,
        )  # fmt: skip
        request.check()
        size = size_of(
            chosen.generation, height=height, width=width, frames=frames, steps=steps, guidance=guidance
        )  # fmt: skip
        warning = check_geometry(opened, str(cache), chosen, size, force=force)
        if warning is not None:
            screen.warn(warning)
        if not force:
            warning = check_fit(opened, chosen, size, backend=backend, model=model)
            if warning is not None:
                screen.warn(warning)
        generator = Generator(
            opened, backend=backend, loras=lora or (), model=model,
            options=DeviceOptions(
                offload=offload, cuda_graphs=cuda_graphs, check_finite=check_finite, device=device
            ),
        )  # fmt: skip
        timesteps = generator.timesteps(request)
        stretched = stretch_warning(chosen.cache, len(timesteps))
        if stretched is not None:
            screen.warn(stretched)
        ahead = forecast(generator.transformer.session.model, timesteps, chosen.cache)
        if ahead is not None and chosen.cache.policy != "off":
            screen.note(
                f"decisions known ahead: {ahead.computed_steps:.0f} of {ahead.steps} steps computed, "
                f"ideal speedup {ahead.ideal_speedup:.2f}"
            )
        recorder: Any = None
        if record is not None:
            recorder = TraceRecorder(record_signals, record_tokens)
        if report is not None:
            from freewheel.tuning.report import ChangeRecorder

            recorder = ChangeRecorder()
            _warm_up(generator, request)
        with screen.progress():
            screen.phase("denoise", request.value("steps"))
            result = generator.generate(
                request, recorder=recorder, on_step=lambda done, total: screen.advance("")
            )
        write_video(result.frames, out, fps)
        if record is not None:
            recorder.trace().save(record)
        parameters = generator.transformer.session.resolved.parameters
        data = {**result.statistics.as_dict(parameters), "measured_speedup": None}
        for warning in data["warnings"]:
            screen.warn(warning)
        if report is not None:
            reference = _report(report, generator, request, result, recorder, parameters)
            data["measured_speedup"] = result.speedup_over(reference)
            screen.note(f"report: {report}")
        _run_tables(screen, data)
        screen.result(
            {"out": str(out), "cache": chosen.cache.model_dump(), "resolved": result.resolved,
             "phase_seconds": result.seconds, **data},
            [str(out)],
        )  # fmt: skip


def _report(
    path: Path, generator: Any, request: Any, result: Any, recorder: Any, parameters: Any
) -> Any:
    """Write a run's page; return the uncached run that is made for it, watched alike."""
    from freewheel.tuning.report import ChangeRecorder, write_run_report

    reference = generator.generate(_uncached(request), recorder=ChangeRecorder())
    write_run_report(
        path, prompt=request.prompt, result=result, reference=reference, recorder=recorder,
        parameters=parameters,
    )  # fmt: skip
    return reference


def _warm_up(generator: Any, request: Any) -> None:
    """Run a few steps with and without the cache, so that neither of two timed runs is the first."""
    from dataclasses import replace

    from freewheel.runtime.bench import WARM_UP_STEPS

    for each in (request, _uncached(request)):
        generator.generate(replace(each, steps=WARM_UP_STEPS))


def _uncached(request: Any) -> Any:
    from dataclasses import replace

    from freewheel.configs.setting import CacheSetting

    return replace(request, cache=CacheSetting())


def _run_tables(screen: Screen, data: dict[str, Any]) -> None:
    rows = []
    for name, branch in data["branches"].items():
        spread = branch["percentiles"] or {}
        computed = sum(branch["computed"])
        rows.append(
            [
                name,
                computed,
                len(branch["computed"]) - computed,
                *(spread.get(p) for p in ("p25", "p50", "p75", "max")),
            ]
        )
    screen.table(
        f"policy {data['policy']}"
        + (f", {data['form']}" if data["form"] else "")
        + (" (folded ahead of the loop)" if data["folded"] else ""),
        ["branch", "computed", "reused", "distance p25", "p50", "p75", "max"],
        rows,
    )
    seconds = data["step_seconds"]
    speed = {
        "computed step s": _seconds(seconds["computed"]),
        "reused step s": _seconds(seconds["reused"]),
        "ideal speedup": data["ideal_speedup"],
        "estimated speedup": data["estimated_speedup"],
    }
    if data["measured_speedup"] is not None:
        speed["measured speedup"] = data["measured_speedup"]
    screen.table("speed", list(speed), [list(speed.values())])
    screen.table(
        "seconds by segment",
        ["segment", "seconds"],
        [[n, _seconds(s)] for n, s in data["seconds"].items()],
    )


def _seconds(value: float | None) -> str | None:
    return None if value is None else f"{value:.4f}"


@command()
def replay(
    trace: Annotated[Path, typer.Argument(help="File that `run --record` wrote.")],
    config: Annotated[
        str,
        typer.Option(
            "--config", "--config_json", "--cache", help="Config name or file, or policy."
        ),
    ],
    set_: SetOption = None,
    sweep: Annotated[
        str | None,
        typer.Option(help="Try many values of a parameter: key=first:last:count, or key=a,b,c."),
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Evaluate a policy on a recorded run, without the model.

    Example: freewheel replay out/trace.npz --config teacache --set threshold=0.2

    Example: freewheel replay out/trace.npz --config teacache --sweep threshold=0.02:0.4:40
    """
    with _screen("replay", as_json, quiet, debug) as screen:
        from freewheel.configs.load import load_config
        from freewheel.configs.overrides import apply_overrides
        from freewheel.policies import policy
        from freewheel.runtime.replay import replay as run_replay
        from freewheel.runtime.settings import warn_of_ignored
        from freewheel.runtime.trace import load_trace

        loaded = load_config(config)
        warn_of_ignored(loaded, config, screen.warn)
        setting = loaded.setting()
        spec = policy(setting.policy).spec
        setting = apply_overrides(setting, _pairs(set_), spec)
        if sweep is not None:
            from freewheel.runtime.sweep import run_sweep, sweep_table

            rows = run_sweep(load_trace(trace), setting, spec, sweep)
            swept = {"policy": setting.policy, "sweep": [vars(r) for r in rows]}
            screen.result(swept, [sweep_table(rows)])
            return
        data = run_replay(load_trace(trace), setting).as_dict()
        lines = [
            data["policy"]
            + (f" ({data['form']})" if data["form"] else "")
            + f": {data['computed_steps']} of {data['steps']} steps computed, "
            f"ideal speedup {data['ideal_speedup']:.2f}"
        ]
        for name, branch in data["branches"].items():
            marks = "".join("#" if c else "." for c in branch["computed"])
            errors = [e for e in branch["reuse_error"] if e is not None]
            mean = f"  mean reuse error {sum(errors) / len(errors):.4f}" if errors else ""
            lines.append(f"{name:8} {marks}{mean}")
        screen.result(data, lines)


@command()
def inspect(
    target: Annotated[
        Path, typer.Argument(help="Bundle, or the diffusers folder that one is to be built from.")
    ],
    height: Annotated[int | None, typer.Option(help="Pixels to forecast for.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels to forecast for.")] = None,
    frames: Annotated[int | None, typer.Option(help="Frames to forecast for.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps to forecast for.")] = None,
    engine: Annotated[
        str | None, typer.Option(help="Graph whose layers to list, as TensorRT built them.")
    ] = None,
    config: Annotated[
        str, typer.Option("--config", "--config_json", help="Before building: caching config.")
    ] = "off",
    backend: Annotated[str, typer.Option(help="Before building: backend.")] = "auto",
    precision: Annotated[str, typer.Option(help="Before building: of the body.")] = "float32",
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show graphs, engines, memory, FLOPs and the speedup each policy can give.

    Of a diffusers folder, before building, what a build and a run of it will need.

    Example: freewheel inspect out/bundle --frames 81
    """
    with _screen("inspect", as_json, False, debug) as screen:
        from freewheel.bundle.reader import MANIFEST, Bundle
        from freewheel.compiler.inspect import inspect_bundle, render

        if target.is_dir() and not (target / MANIFEST).is_file():
            from freewheel.compiler.forecast_build import render_plan

            data = _plan(target, config, backend, precision, screen, (height, width, frames, steps))
            screen.result(data, render_plan(data))
            return
        data = inspect_bundle(
            Bundle(target), height=height, width=width, frames=frames, steps=steps, engine=engine
        )
        screen.result(data, render(data))


def _plan(
    model: Path, config: str, backend: str, precision: str, screen: Screen, size: tuple[int | None, ...]
) -> dict[str, Any]:  # fmt: skip
    """Forecast a build of ``model`` into a bundle beside it, and a run at ``size``."""
    from freewheel.compiler.build import BuildRequest, plan
    from freewheel.compiler.defaults import resolve_configs
    from freewheel.compiler.sizes import size_of
    from freewheel.runtime.settings import config_entries

    precision = _precision(precision)
    configs = config_entries([config], screen.warn)
    height, width, frames, steps = size
    generation = next(iter(resolve_configs(configs, None).values())).generation
    request = BuildRequest(
        model=str(model),
        out=model.absolute().with_name(f"{model.name}-bundle"),
        backends=[_backend(backend, precision, screen, to_build=True)],
        configs=configs,
        precision=precision,  # type: ignore[arg-type]  # one of the three
    )
    return plan(
        request, size_of(generation, height=height, width=width, frames=frames, steps=steps)
    )


@command()
def verify(
    bundle: BundleArgument,
    backend: Annotated[
        str | None, typer.Option(help="Backend; default: the bundle's first.")
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Check digests, every engine against PyTorch, every compiled policy against its law.

    Example: freewheel verify out/bundle
    """
    with _screen("verify", as_json, quiet, debug) as screen:
        from freewheel.bundle.reader import Bundle
        from freewheel.compiler.verify import verify_bundle

        with screen.progress():
            report = verify_bundle(Bundle(bundle), backend, screen)
        data = report.as_dict()
        screen.table(
            "engines",
            ["graph", "block", "output", "relative error", "tolerance", "ok"],
            report.rows(),
        )
        screen.result(data, [report.summary()])
        report.raise_on_mismatch()


@command()
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
    steps: Annotated[int | None, typer.Option(help="Denoise steps.")] = None,
    image: Annotated[Path | None, typer.Option(help="First frame, for image-to-video.")] = None,
    eager: Annotated[
        bool, typer.Option(help="Time diffusers eager on the same checkpoint too.")
    ] = False,
    backend: Annotated[
        str | None, typer.Option(help="Backend; default: the bundle's first.")
    ] = None,
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
    with _screen("bench", as_json, quiet, debug) as screen:
        from freewheel.bundle.reader import Bundle
        from freewheel.compiler.geometry import check_geometry
        from freewheel.compiler.sizes import size_of
        from freewheel.configs.output import check_file
        from freewheel.runtime.bench import BenchRequest, bench_bundle, read_prompts
        from freewheel.runtime.settings import choose_setting

        if report is not None:
            check_file(report, "--report")
        texts = [*(prompt or []), *(read_prompts(prompts) if prompts else [])]
        _quiet_libraries()
        opened = Bundle(bundle)
        for name in cache or opened.manifest.configs:
            chosen = choose_setting(opened, name, {}, lambda _: None)
            size = size_of(chosen.generation, steps=steps)
            warning = check_geometry(opened, name, chosen, size, force=force)
            if warning is not None:
                screen.warn(warning)
        request = BenchRequest(
            prompts=texts, seeds=list(range(seeds)), caches=cache or None, rounds=rounds, steps=steps,
            eager=eager, backend=backend, out=out, image=image,
        )  # fmt: skip
        with screen.progress():
            measured = bench_bundle(opened, request, screen, screen.warn)
        if report is not None:
            from freewheel.tuning.report import write_bench_report

            write_bench_report(report, measured)
            screen.note(f"report: {report}")
        screen.table("bench", measured.columns, measured.rows())
        screen.result(measured.as_dict(), [measured.markdown()])


@command()
def calibrate(
    bundle: BundleArgument,
    prompts: Annotated[Path, typer.Option(help="Text file, one prompt per line; one run each.")],
    out: Annotated[Path, typer.Option(help="File of configs to write (.json).")],
    speedup: Annotated[
        list[float] | None,
        typer.Option(help="Ideal speedup to write configs for; repeatable. Default 1.5 2 2.5 3 4."),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Denoise steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; 1 turns it off.")] = None,
    first_seed: Annotated[int, typer.Option(help="Seed of the first prompt's noise.")] = 1000,
    history: Annotated[int, typer.Option(help="Residuals that solved mixes use, 1 to 6.")] = 6,
    refine: Annotated[
        int,
        typer.Option(min=0, help="Prompts whose cached runs solved schedules are fitted on."),
    ] = 8,
    search: Annotated[
        int,
        typer.Option(min=0, help="Rounds of moving the steps that solved schedules compute."),
    ] = 3,
    backend: Annotated[
        str | None, typer.Option(help="Backend; default: the bundle's first.")
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Record uncached runs, and write a config per policy and speedup.

    Example: freewheel calibrate out/bundle --prompts prompts.txt --out calibration.json
    """
    with _screen("calibrate", as_json, quiet, debug) as screen:
        from freewheel.bundle.reader import Bundle
        from freewheel.configs.output import check_file
        from freewheel.runtime.bench import read_prompts
        from freewheel.tuning.calibrate import SPEEDUPS, CalibrationRequest, save_calibration
        from freewheel.tuning.calibrate import calibrate as run_calibrate

        check_file(out, "--out")
        _quiet_libraries()
        request = CalibrationRequest(
            prompts=read_prompts(prompts), first_seed=first_seed, steps=steps, guidance=guidance,
            history=history, refine=refine, search=search, backend=backend, speedups=speedup or SPEEDUPS,
        )  # fmt: skip
        with screen.progress():
            found = run_calibrate(Bundle(bundle), request, screen, screen.warn)
        save_calibration(found, out)
        for name, reason in found.left_out.items():
            screen.warn(f"no config '{name}': {reason}")
        screen.table(
            "fits of TeaCache's polynomial",
            ["signal", "R²", "used"],
            [[n, round(f.r2, 3), not f.refusal] for n, f in found.fits.items()],
        )
        screen.result({"out": str(out), **found.as_dict()}, [f"{out}#{n}" for n in found.configs])
        screen.note(f"next: freewheel run {bundle} --cache '{out}#{next(iter(found.configs), '')}'")


@command()
def tune(
    bundle: BundleArgument,
    prompts: Annotated[Path, typer.Option(help="Text file, one prompt per line.")],
    out: Annotated[Path, typer.Option(help="Config to write (.json).")],
    target_speedup: Annotated[
        float | None, typer.Option(help="Find the best quality at this measured speedup.")
    ] = None,
    min_psnr: Annotated[
        float | None, typer.Option(help="Find the fastest of at least this mean PSNR, dB.")
    ] = None,
    min_ssim: Annotated[
        float | None, typer.Option(help="Find the fastest of at least this mean SSIM.")
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="File that `calibrate` wrote, to search as well.")
    ] = None,
    traces: Annotated[
        int, typer.Option(help="Prompts to record and replay; the others confirm.")
    ] = 2,
    confirm: Annotated[int, typer.Option(help="Candidates to confirm by real runs.")] = 8,
    rounds: Annotated[int, typer.Option(help="Timed runs of each candidate, at least.")] = 3,
    steps: Annotated[int | None, typer.Option(help="Denoise steps.")] = None,
    backend: Annotated[
        str | None, typer.Option(help="Backend; default: the bundle's first.")
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Find the setting for a wanted speedup or quality, and write it as a config.

    Example: freewheel tune out/bundle --prompts prompts.txt --target-speedup 2 --out tuned.json
    """
    with _screen("tune", as_json, quiet, debug) as screen:
        from freewheel.bundle.reader import Bundle
        from freewheel.configs.output import check_file
        from freewheel.runtime.bench import read_prompts
        from freewheel.tuning.tune import Goal, TuneRequest, save_config
        from freewheel.tuning.tune import tune as run_tune

        check_file(out, "--out")
        request = TuneRequest(
            goal=Goal(target_speedup, min_psnr, min_ssim), prompts=read_prompts(prompts), traces=traces,
            calibration=calibration, confirm=confirm, rounds=rounds, steps=steps, backend=backend,
        )  # fmt: skip
        _quiet_libraries()
        with screen.progress():
            report = run_tune(Bundle(bundle), request, screen, screen.warn)
        screen.table(
            "confirmed by real runs (* none is faster and better)", report.columns, report.table()
        )
        if report.chosen is None:
            raise RequestError(
                "tune", "found no setting that reaches the goal",
                "ask for less, give --calibration, or raise --confirm",
            )  # fmt: skip
        save_config(report.configs[report.chosen], out)
        screen.result({"out": str(out), **report.as_dict()}, [f"{out}: {report.chosen}"])


@command()
def serve(
    bundle: BundleArgument,
    out: Annotated[Path, typer.Option(help="Model repository of the server; made where missing.")],
    name: Annotated[
        str | None, typer.Option(help="Name of the model; default: the bundle folder's.")
    ] = None,
    version: Annotated[
        int | None, typer.Option(help="Version to write; default: the one after the newest.")
    ] = None,
    instances: Annotated[int, typer.Option(help="Requests that run at once.")] = 1,
    threads: Annotated[
        int | None,
        typer.Option(help="CPU threads of a run; default: the cores divided by the instances."),
    ] = None,
    backend: Annotated[
        str | None, typer.Option(help="Backend; default: the first that C++ runs.")
    ] = None,
    backend_directory: Annotated[
        Path, typer.Option(help="Folder with freewheel/libtriton_freewheel.so, for the command.")
    ] = Path("build/cpp/backends"),
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Write a model repository for Triton Inference Server, or the next version of a model in one.

    Example: freewheel serve out/bundle --out out/models --name wan
    """
    with _screen("serve", as_json, quiet, debug) as screen:
        from freewheel.bundle.reader import Bundle
        from freewheel.serving.commands import example_request, start_server
        from freewheel.serving.repository import ServeRequest, write_repository

        opened = Bundle(bundle)
        request = ServeRequest(
            bundle=opened, out=out, name=name, version=version, instances=instances,
            backend=backend, threads=threads,
        )  # fmt: skip
        written = write_repository(request)
        library = backend_directory / "freewheel" / "libtriton_freewheel.so"
        if not library.is_file():
            screen.warn(f"{library} is not there yet; docs/how-to/serve.md says how to build it")
        commands = {
            "server": start_server(out, backend_directory),
            "request": example_request(opened, written),
        }
        screen.note(
            f"{written.folder}, version {written.version}: {written.bytes / 1e6:.1f} MB, "
            f"{written.copied_bytes / 1e6:.1f} MB of them copied"
        )
        data = {
            "model": written.name,
            "version": written.version,
            "folder": str(written.folder),
            "bytes": written.bytes,
            "copied_bytes": written.copied_bytes,
            "commands": commands,
        }
        screen.result(data, list(commands.values()))


def _quiet_libraries() -> None:
    """Keep other libraries' progress bars out of ours."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def _backend(name: str, precision: str, screen: Screen, *, to_build: bool = False) -> Any:
    from freewheel.engines import auto_backend, backend

    if name != "auto":
        return backend(name, to_build=to_build)
    chosen, reasons = auto_backend(precision)
    screen.note(f"backend {chosen.name}: {reasons[chosen.name]}")
    return chosen


def _choice(flag: str, value: str, known: tuple[str, ...]) -> str:
    if value not in known:
        raise ConfigError(flag, f"'{value}' is not known", f"use one of {', '.join(known)}")
    return value


def _precision(value: str) -> str:
    known = ("float32", "bfloat16", "float16")
    short = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16"}
    if value in short:
        raise ConfigError("--precision", f"'{value}' is not known", f"use {short[value]}")
    if re.fullmatch(r"(fp|nf|mxfp|u?int|float)[48](_\w+)?", value):
        raise ConfigError(
            "--precision", f"'{value}': a body of 8 bits or fewer is not built",
            "use bfloat16 or float16, which halve float32's memory",
        )  # fmt: skip
    return _choice("--precision", value, known)


def _pairs(texts: list[str] | None) -> dict[str, str]:
    pairs = {}
    for text in texts or ():
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise ConfigError(f"--set '{text}'", "is not key=value", "write --set threshold=0.2")
        pairs[key] = value
    return pairs


def main() -> None:
    """Run the command line; a bug of ours exits with 70 and its traceback."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # nothing half written is left
    try:
        app()
    except (SystemExit, KeyboardInterrupt):
        raise
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    except Exception as error:
        traceback.print_exc()
        if "--json" in sys.argv:
            what = f"internal error: {type(error).__name__}: {error}"
            Screen(as_json=True).error(Bug("freewheel", what, "report the traceback"))
        raise SystemExit(Bug.exit_code) from None


if __name__ == "__main__":
    main()
