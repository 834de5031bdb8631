# SPDX-License-Identifier: Apache-2.0
"""`freewheel run`: make a video, a picture or sound from a prompt."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..core.errors import ConfigError, RequestError
from ..core.launch import launch
from .options import (
    BackendOption,
    CacheOption,
    CudaGraphsOption,
    DebugOption,
    DeviceOption,
    GuidanceOption,
    ImageOption,
    JsonOption,
    OffloadOption,
    QuietOption,
    SetOption,
    StepsOption,
    backend_of,
    pairs_of,
    quiet_libraries,
    value_of,
)
from .ranks import join_job
from .screen import Screen, reporting

__all__ = ["run"]

LIGHTX2V = "LightX2V's flags"


def run(
    out: Annotated[
        Path,
        typer.Option(
            "--out", "--save_result_path", help="File to write: .mp4, .gif, .png or .wav."
        ),
    ],
    bundle: Annotated[
        Path | None,
        typer.Argument(
            help="Folder that `build` wrote; with --model_path, one to build if need be."
        ),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="What to show; needed where the pipeline takes text.")
    ] = None,
    negative_prompt: Annotated[
        str, typer.Option("--negative-prompt", "--negative_prompt", help="What not to show.")
    ] = "",
    cache: CacheOption = None,
    set_: SetOption = None,
    deadline: Annotated[
        str | None,
        typer.Option(
            help="Seconds that the denoise steps may take, 20 or 20s: a solved config computes as "
            "many steps as fit."
        ),
    ] = None,
    steps: StepsOption = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the initial noise.")] = None,
    guidance: GuidanceOption = None,
    guidance_2: Annotated[
        float | None, typer.Option("--guidance-2", help="Guidance scale of the second expert.")
    ] = None,
    sampler: Annotated[
        str | None,
        typer.Option(help="unipc, euler, dpmpp_2m, distilled or lcm; default: the pipeline's own."),
    ] = None,
    shift: Annotated[float | None, typer.Option(help="Flow shift of the sampler.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    frames: Annotated[int | None, typer.Option(help="Frames of the video.")] = None,
    image: ImageOption = None,
    video: Annotated[Path | None, typer.Option(help="Video to begin with.")] = None,
    mask: Annotated[
        Path | None, typer.Option(help="White where something new is to be made.")
    ] = None,
    strength: Annotated[
        float | None, typer.Option(help="How much of the picture or video is made anew, 0 to 1.")
    ] = None,
    set_pipe: Annotated[
        list[str] | None,
        typer.Option(help="Another argument of the pipeline's call: key=value; repeatable."),
    ] = None,
    lora: Annotated[
        list[str] | None, typer.Option(help="FILE[:scale] to merge at load; repeatable.")
    ] = None,
    backend: BackendOption = None,
    model: Annotated[
        Path | None, typer.Option(help="Diffusers folder, if the bundle lacks the pipeline.")
    ] = None,
    offload: OffloadOption = False,
    cuda_graphs: CudaGraphsOption = False,
    device: DeviceOption = None,
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
    fps: Annotated[
        int | None, typer.Option(help="Frames per second; default: 8, or LightX2V's config's.")
    ] = None,
    model_path: Annotated[
        Path | None,
        typer.Option(
            "--model_path",
            help="LightX2V: the model's folder, in its authors' layout.",
            rich_help_panel=LIGHTX2V,
        ),
    ] = None,
    model_cls: Annotated[
        str,
        typer.Option(
            "--model_cls",
            help="LightX2V: wan2.1, wan2.1_distill, wan2.2_moe or wan2.2_moe_distill.",
            rich_help_panel=LIGHTX2V,
        ),
    ] = "wan2.1",
    task: Annotated[
        str, typer.Option(help="LightX2V: t2v or i2v.", rich_help_panel=LIGHTX2V)
    ] = "t2v",
    use_prompt_enhancer: Annotated[
        bool,
        typer.Option(
            "--use_prompt_enhancer",
            help="LightX2V: without effect where its config names no server.",
            rich_help_panel=LIGHTX2V,
        ),
    ] = False,
    force: Annotated[
        bool, typer.Option(help="Run even where the forecast says that memory will not do.")
    ] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Make a video, a picture or sound from a prompt, as the bundle's pipeline does.

    Example: freewheel run out/bundle --prompt "a red circle" --cache teacache --out video.mp4
    """
    with reporting("run", as_json, quiet, debug) as screen:
        from ..bundle.files import cache_beside
        from ..bundle.reader import Bundle
        from ..compiler.forecast.geometry import check_geometry
        from ..compiler.forecast.memory_check import check_fit
        from ..compiler.lightx2v import LightX2VRequest, ready_bundle
        from ..compiler.sizes import size_of
        from ..core.extras import require_extra
        from ..core.output import check_file
        from ..runtime.forecast.fold import forecast
        from ..runtime.model import DeviceOptions
        from ..runtime.pipeline.generate import Generator, check_ahead, check_recordable
        from ..runtime.pipeline.request import GenerationRequest
        from ..runtime.pipeline.sound import write_sound
        from ..runtime.pipeline.video import check_output, write_video
        from ..runtime.settings import choose_setting, stretch_warning
        from ..runtime.summary import live_strip
        from ..tuning.trace import TraceRecorder

        check_output(out, 8 if fps is None else fps)
        if report is not None:
            require_extra("report", "run --report")
        for flag, path in (("--record", record), ("--report", report)):
            if path is not None:
                check_file(path, flag)
            if path == out:
                raise RequestError(f"{flag} '{path}'", "is --out's file too", "name another")
        if record is not None and report is not None:
            raise RequestError("--record", "can't be given with --report", "make two runs")
        if record_tokens is not None and record_tokens < 1:
            raise RequestError(f"--record-tokens {record_tokens}", "is below 1", "use 64")
        quiet_libraries()
        loras = list(lora or ())
        if model_path is not None:
            request_of_lightx2v = LightX2VRequest(
                model_path=model_path, config_json=Path(cache or ""), model_cls=model_cls, task=task,
                bundle=bundle, cache=cache_beside(bundle or Path("bundle")),
            )  # fmt: skip
            if cache is None:
                raise ConfigError("--model_path", "comes with a config", "give --config_json FILE")
            if use_prompt_enhancer:
                screen.warn("no effect of --use_prompt_enhancer: the config names no server of it")
            chosen_backend = backend_of(backend or "auto", "float32", screen, to_build=True)
            with screen.progress():
                bundle, told = ready_bundle(
                    request_of_lightx2v, chosen_backend, screen, screen.warn, screen.note
                )
            cache, loras, fps = told.config.name, [*told.loras, *loras], fps or told.fps
        elif bundle is None:
            raise RequestError("run", "is given no bundle", "name one, or give --model_path")
        else:
            _refuse_without_model(model_cls, task, use_prompt_enhancer)
        opened = Bundle(bundle)
        if record is not None:
            check_recordable(opened)
        overrides = pairs_of(set_) | ({} if deadline is None else {"deadline": deadline})
        chosen = choose_setting(opened, cache, overrides, screen.warn)
        request = GenerationRequest(
            prompt=prompt, negative_prompt=negative_prompt, cache=chosen.cache, defaults=chosen.generation,
            steps=steps, height=height, width=width, frames=frames, guidance_scale=guidance, seed=seed,
            image=image, sampler=sampler, flow_shift=shift, guidance_scale_2=guidance_2,
            video=video, mask=mask, strength=strength,
            extra={n: value_of(v) for n, v in pairs_of(set_pipe, "--set-pipe", "eta=0.5").items()},
        )  # fmt: skip
        request.check()
        check_ahead(opened, request, out, model)
        ranks = _join(opened, request, backend, lora, device, record, report)
        size = size_of(
            chosen.generation, height=height, width=width, frames=frames, steps=steps, guidance=guidance
        )  # fmt: skip
        warning = check_geometry(opened, str(cache), chosen, size, force=force)
        if warning is not None:
            screen.warn(warning)
        if not force:
            warning = check_fit(opened, chosen, size, backend=backend, model=model, gpu=device)
            if warning is not None:
                screen.warn(warning)
        generator = Generator(
            opened, backend=backend, loras=loras, model=model,
            options=DeviceOptions(
                offload=offload, cuda_graphs=cuda_graphs, check_finite=check_finite, device=device
            ),
            ranks=ranks,
        )  # fmt: skip
        fps = fps or round(generator.frame_rate(request) or 8)
        check_output(out, fps)
        timesteps = generator.timesteps(request)
        count = request.value("steps") if timesteps is None else len(timesteps)
        stretched = stretch_warning(chosen.cache, count)
        if stretched is not None:
            screen.warn(stretched)
        ahead = None
        # Of two experts, each folds its own part of the timesteps.
        if timesteps is not None and len(generator.transformer.experts) == 1:
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
            recorder = _report_recorder(generator, request)
            _warm_up(generator, request)
        with screen.progress():
            screen.phase("denoise", request.value("steps"))
            result = generator.generate(
                request, recorder=recorder,
                on_step=lambda done, total: screen.advance(live_strip(generator.transformer.statistics)),
            )  # fmt: skip
        if ranks is not None and not ranks.leads:
            ranks.leave()
            return
        written = []
        if len(result.frames):
            write_video(result.frames, out, fps)
            written.append(out)
        if result.sound is not None:  # beside a video's file
            written.append(out.with_suffix(".wav"))
            write_sound(result.sound, written[-1])
        if record is not None:
            recorder.trace().save(record)
        parameters = generator.transformer.session.resolved.parameters
        data = {**result.statistics.as_dict(parameters), "measured_speedup": None}
        for warning in [*data["warnings"], *generator.transformer.rank_warnings()]:
            screen.warn(warning)
        if report is not None:
            reference = _report(report, generator, request, result, recorder, parameters)
            data["measured_speedup"] = result.speedup_over(reference)
            screen.note(f"report: {report}")
        _run_tables(screen, data)
        if ranks is not None:
            data["exchange"] = _exchange(generator, ranks.size)
            screen.table(
                "bytes that rank 0 sent", list(data["exchange"]), [list(data["exchange"].values())]
            )
            ranks.leave()
        screen.result(
            {"out": str(out), "written": [str(path) for path in written],
             "cache": chosen.cache.model_dump(), "resolved": result.resolved,
             "phase_seconds": result.seconds, **data},
            [str(path) for path in written],
        )  # fmt: skip


def _refuse_without_model(model_cls: str, task: str, use_prompt_enhancer: bool) -> None:
    """Refuse LightX2V's flags that concern its --model_path alone."""
    given = {
        "--model_cls": model_cls != "wan2.1", "--task": task != "t2v",
        "--use_prompt_enhancer": use_prompt_enhancer,
    }  # fmt: skip
    for flag in (flag for flag, is_given in given.items() if is_given):
        raise RequestError(flag, "is LightX2V's, and comes with --model_path", "leave it out")


def _join(
    bundle: Any, request: Any, backend: str | None, loras: list[str] | None, device: int | None,
    record: Path | None, report: Path | None,
) -> Any:  # fmt: skip
    """Join the ranks that a launcher started, once they agree; None in a process started alone."""
    if launch() is None:
        return None
    for flag, path in (("--record", record), ("--report", report)):
        if path is not None:
            raise RequestError(
                f"{flag} {path}", "is for one process, and a launcher started several",
                "start the run alone",
            )  # fmt: skip
    scale = request.value("guidance_scale")
    if scale <= 1:
        raise RequestError(
            f"--guidance {scale:g}", "is no guidance: a run has one branch, and ranks share branches",
            "start the run alone, or give --guidance above 1",
        )  # fmt: skip
    ranks = join_job(bundle, request, device)
    ranks.compare({"--backend": str(backend), "--lora": str(loras or [])})
    return ranks


def _exchange(generator: Any, ranks: int) -> dict[str, Any]:
    """Return the bytes that a run sent; of two transformers, those of the one that ran last."""
    experts = [e.exchange for e in generator.transformer.experts if e.exchange.formula]
    return {"ranks": ranks, **experts[-1].as_dict()}


def _report(
    path: Path, generator: Any, request: Any, result: Any, recorder: Any, parameters: Any
) -> Any:
    """Write a run's page; return the uncached run that is made for it, watched alike."""
    from ..tuning.provenance import provenance
    from ..tuning.report import write_run_report

    uncached = _report_recorder(generator, request)
    reference = generator.generate(_uncached(request), recorder=uncached)
    backend = generator.transformer.session.model.backend.name
    write_run_report(
        path, prompt=request.prompt or "", result=result, reference=reference, recorder=recorder,
        uncached=uncached, setting=request.cache, parameters=parameters,
        provenance=provenance(generator.bundle, backend, ["freewheel", *sys.argv[1:]]),
    )  # fmt: skip
    return reference


def _report_recorder(generator: Any, request: Any) -> Any:
    """Make what watches a run for its page; hidden-sized signals cost time, so only if looked at."""
    from ..tuning.run_recorder import RunRecorder

    policy = generator.bundle.manifest.policies.get(request.cache.policy)
    signals = policy.spec.signals if policy is not None else []
    looked_at = request.cache.signal or next(iter(signals), None)
    return RunRecorder(wants_signals=looked_at in ("modulated_input", "first_block_residual"))


def _warm_up(generator: Any, request: Any) -> None:
    """Run a few steps with and without the cache, so that neither of two timed runs is the first."""
    from dataclasses import replace

    from ..tuning.bench import WARM_UP_STEPS

    for each in (request, _uncached(request)):
        generator.generate(replace(each, steps=WARM_UP_STEPS))


def _uncached(request: Any) -> Any:
    from dataclasses import replace

    from ..policies.setting import CacheSetting

    return replace(request, cache=CacheSetting())


def _run_tables(screen: Screen, data: dict[str, Any]) -> None:
    rows = []
    for name, branch in data["branches"].items():
        spread = branch["percentiles"] or {}
        rows.append(
            [
                name,
                branch["computed"].count(True),
                branch["computed"].count(False),
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
