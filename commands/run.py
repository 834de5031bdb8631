# SPDX-License-Identifier: Apache-2.0
"""`freewheel run`: make a video, a picture or sound from a prompt."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..bundle.guidance import branch_count, embeds_guidance
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
from .run_files import RunFiles
from .run_outcome import outcome, show_outcome, write_media
from .screen import Screen, reporting

if TYPE_CHECKING:
    from ..compiler.lightx2v import LightX2VRequest
    from ..configs.lightx2v import LightX2VConfig

__all__ = ["run"]

LIGHTX2V = "LightX2V's flags"


def run(
    out: Annotated[
        Path,
        typer.Option(
            "--out", "--save_result_path", help="File to write: .mp4, .gif, .webp, .png or .wav."
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
    min_psnr: Annotated[
        float | None,
        typer.Option(
            help="dB against the uncached run that nine runs in ten keep: a solved config computes the "
            "fewest steps that do; needs `calibrate --hold-out`."
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
        list[str] | None,
        typer.Option(
            help="FILE[:scale] to merge at load; repeatable. transformer_2=FILE: into the second expert."
        ),
    ] = None,
    backend: BackendOption = None,
    model: Annotated[
        Path | None, typer.Option(help="Diffusers folder, if the bundle lacks the pipeline.")
    ] = None,
    offload: OffloadOption = False,
    cuda_graphs: CudaGraphsOption = False,
    device: DeviceOption = None,
    guidance_ranks: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=2,
            help="Groups of processes that the branches of guidance are shared out over; those of a "
            "group share a sequence. Default: 1 of a bundle built with --sequence-parallel, else 2.",
        ),
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
        from ..compiler.sizes import size_of
        from ..runtime.model import DeviceOptions
        from ..runtime.pipeline.generate import Generator, check_ahead
        from ..runtime.pipeline.request import GenerationRequest
        from ..runtime.pipeline.video import check_output
        from ..runtime.settings import choose_setting
        from ..runtime.summary import live_strip

        check_output(out, 8 if fps is None else fps)
        told_of = RunFiles(record, report, record_tokens, record_signals)
        told_of.check(out)
        quiet_libraries()
        loras = list(lora or ())
        if model_path is not None:
            from ..compiler.lightx2v import LightX2VRequest

            authors = LightX2VRequest(
                model_path=model_path,
                config_json=Path(cache or ""),
                model_cls=model_cls,
                task=task,
                bundle=bundle,
                cache=cache_beside(bundle or Path("bundle")),
                has_loras=bool(loras),
            )
            bundle, told = _bundle_of_authors(authors, cache, backend, use_prompt_enhancer, screen)
            cache, loras, fps = told.config.name, [*told.loras, *loras], fps or told.fps
        elif bundle is None:
            raise RequestError("run", "is given no bundle", "name one, or give --model_path")
        else:
            _refuse_without_model(model_cls, task, use_prompt_enhancer)
        opened = Bundle(bundle)
        asked = {"deadline": deadline, "min_psnr": min_psnr}
        overrides = pairs_of(set_) | {n: str(v) for n, v in asked.items() if v is not None}
        chosen = choose_setting(opened, cache, overrides, screen.warn)
        request = GenerationRequest(
            prompt=prompt, negative_prompt=negative_prompt, cache=chosen.cache, defaults=chosen.generation,
            steps=steps, height=height, width=width, frames=frames, guidance_scale=guidance, seed=seed,
            image=image, sampler=sampler, flow_shift=shift, guidance_scale_2=guidance_2,
            video=video, mask=mask, strength=strength,
            extra={n: value_of(v) for n, v in pairs_of(set_pipe, "--set-pipe", "eta=0.5").items()},
        )  # fmt: skip
        request.check()
        told_of.check_bundle(opened)
        check_ahead(opened, request, out, model)
        ranks = _join(opened, request, backend, lora, device, told_of, guidance_ranks)
        size = size_of(
            chosen.generation,
            height=height,
            width=width,
            frames=frames,
            steps=steps,
            guidance=guidance,
            true_guidance=request.true_guidance,
        )
        _foretell(
            screen,
            opened,
            str(cache),
            chosen,
            size,
            backend,
            model,
            device,
            offload=offload,
            force=force,
        )
        began = time.perf_counter()
        with screen.progress():
            screen.phase("load")
            generator = Generator(
                opened,
                backend=backend,
                loras=loras,
                model=model,
                options=DeviceOptions(
                    offload=offload,
                    cuda_graphs=cuda_graphs,
                    check_finite=check_finite,
                    device=device,
                ),
                ranks=ranks,
                guidance_ranks=guidance_ranks,
            )
        seconds = {"load": time.perf_counter() - began}
        fps = fps or round(generator.frame_rate(request) or 8)
        check_output(out, fps)
        _tell_decisions(screen, generator, request)
        recorder = told_of.recorder(generator, request)
        with screen.progress():
            screen.phase("denoise", generator.steps(request))
            result = generator.generate(
                request,
                recorder=recorder,
                on_step=lambda done, total: screen.advance(
                    live_strip(generator.transformer.statistics), total=total
                ),
            )
        if ranks is not None and not ranks.leads:
            ranks.leave()
            return
        written = write_media(result, out, fps)
        reference = told_of.write(screen, generator, request, result, recorder)
        data = outcome(
            generator,
            result,
            seconds | result.seconds,
            reference,
            None if ranks is None else ranks.size,
        )
        show_outcome(screen, data)
        if ranks is not None:
            ranks.leave()
        screen.result(
            {
                "out": str(out),
                "written": [str(path) for path in written],
                "cache": chosen.cache.model_dump(),
                "resolved": result.resolved,
                **data,
            },
            [str(path) for path in written],
        )


def _bundle_of_authors(
    request: LightX2VRequest,
    cache: str | None,
    backend: str | None,
    use_prompt_enhancer: bool,
    screen: Screen,
) -> tuple[Path, LightX2VConfig]:
    """Return the bundle of a folder in its authors' layout, built if need be, and what its config says."""
    from ..compiler.lightx2v import ready_bundle

    if cache is None:
        raise ConfigError("--model_path", "comes with a config", "give --config_json FILE")
    if use_prompt_enhancer:
        screen.warn("no effect of --use_prompt_enhancer: the config names no server of it")
    chosen = backend_of(backend or "auto", "float32", screen, to_build=True)
    with screen.progress():
        return ready_bundle(request, chosen, screen, screen.warn, screen.note)


def _refuse_without_model(model_cls: str, task: str, use_prompt_enhancer: bool) -> None:
    """Refuse LightX2V's flags that concern its --model_path alone."""
    given = {
        "--model_cls": model_cls != "wan2.1",
        "--task": task != "t2v",
        "--use_prompt_enhancer": use_prompt_enhancer,
    }
    for flag in (flag for flag, is_given in given.items() if is_given):
        raise RequestError(flag, "is LightX2V's, and comes with --model_path", "leave it out")


def _join(
    bundle: Any,
    request: Any,
    backend: str | None,
    loras: list[str] | None,
    device: int | None,
    told_of: RunFiles,
    guidance_ranks: int | None,
) -> Any:
    """Join the ranks that a launcher started, once they agree; None in a process started alone."""
    from ..runtime.distributed.layout import branches_of

    if launch() is None:
        if guidance_ranks is not None:
            raise RequestError(
                f"--guidance-ranks {guidance_ranks}",
                "is for several processes, and this is one",
                "start it with torchrun, or leave it out",
            )
        return None
    for flag, path in told_of.places().items():
        raise RequestError(
            f"{flag} {path}",
            "is for one process, and a launcher started several",
            "start the run alone",
        )
    scale, inputs = request.value("guidance_scale"), bundle.manifest.inputs.values()
    shares = branches_of(bundle.manifest, guidance_ranks) > 1
    if shares and branch_count(inputs, scale, request.true_guidance) == 1:
        is_inside = embeds_guidance(inputs)
        raise RequestError(
            f"--guidance {scale:g}",
            ("is inside this model" if is_inside else "is no guidance")
            + ": a run has one branch, and ranks share branches",
            "start the run alone, or give "
            + ("--set-pipe true_cfg_scale=4" if is_inside else "--guidance above 1"),
        )
    ranks = join_job(bundle, request, device)
    told = {"--backend": backend, "--lora": loras or [], "--guidance-ranks": guidance_ranks}
    ranks.compare({flag: str(value) for flag, value in told.items()})
    return ranks


def _foretell(
    screen: Screen, bundle: Any, name: str, chosen: Any, size: Any, backend: str | None,
    model: Path | None, device: int | None, *, offload: bool, force: bool,
) -> None:  # fmt: skip
    """Refuse a run that is far beyond the bundle's own, or does not fit in memory; warn of less."""
    from ..compiler.forecast.geometry import check_geometry
    from ..compiler.forecast.memory_check import check_fit

    where: Any = {"backend": backend, "model": model, "gpu": device, "offload": offload}
    warnings = [check_geometry(bundle, name, chosen, size, force=force, **where)]
    if not force:
        warnings.append(check_fit(bundle, chosen, size, **where))
    for warning in filter(None, warnings):
        screen.warn(warning)


def _tell_decisions(screen: Screen, generator: Any, request: Any) -> None:
    """Say what is known of a run's decisions before it starts, and what its tables are too far from."""
    from ..policies.schedule import Schedule
    from ..policies.stretch import stretch_of
    from ..runtime.forecast.fold import forecast

    timesteps = generator.timesteps(request)
    count = request.value("steps") if timesteps is None else len(timesteps)
    stretch = None if timesteps is None else stretch_of(request.cache, Schedule.of(timesteps))
    for text in [] if stretch is None else stretch.warnings():
        screen.warn(text)
    promise = request.cache.promise
    if request.cache.min_psnr is not None and promise is not None:
        screen.note(
            f"{request.cache.parameters['computed_steps']} of {count} steps computed: "
            f"{100 * promise.coverage:.0f} of 100 runs keep {request.cache.min_psnr:g} dB by it, as "
            f"{promise.runs} held-out runs tell"
        )
    # Of two experts, each folds its own part of the timesteps.
    if timesteps is None or len(generator.transformer.experts) > 1:
        return
    ahead = forecast(generator.transformer.session.model, timesteps, request.cache)
    if ahead is not None and request.cache.policy != "off":
        screen.note(
            f"decisions known ahead: {ahead.computed_steps:.0f} of {ahead.steps} steps computed, "
            f"ideal speedup {ahead.ideal_speedup:.2f}"
        )
