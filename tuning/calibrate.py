# SPDX-License-Identifier: Apache-2.0
"""Record uncached runs once and derive a config for every policy and wanted speedup from them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..bundle.reader import Bundle
from ..core.errors import RequestError
from ..core.progress import Progress
from ..policies.config import CachingConfig
from ..policies.solved import SolvedConfig
from ..runtime.distributed.ranks import Ranks, facts_of
from ..runtime.forecast.fold import forecast
from ..runtime.model import Model
from ..runtime.pipeline.generate import Generator, check_recordable
from ..runtime.pipeline.request import GenerationRequest
from ..runtime.settings import choose_setting
from ..runtime.statistics import FEW_STEPS
from .calibration import Calibration, CalibrationRequest, Told
from .effort import duration, model_runs
from .gram import GramRecorder, RecordedRun
from .held_out import held_out_psnr, with_psnr
from .lockstep import sampler_table
from .pieces import Pieces
from .shares import Shares
from .solved_configs import solved_configs
from .threshold_configs import polynomials, threshold_configs

__all__ = ["calibrate", "few_steps_advice"]


def calibrate(
    bundle: Bundle,
    request: CalibrationRequest,
    progress: Progress,
    warn: Callable[[str], None],
    tell: Callable[[str], None] = lambda text: None,
    ranks: Ranks | None = None,
) -> Calibration:
    """Record, fit and solve.

    Args:
        bundle: An open bundle.
        request: What to do.
        progress: Shown each run.
        warn: Told of refused fits and of step counts too low to cache.
        tell: Told first what it will take, in model runs, and once the first is done in time.
        ranks: Processes that share prompts and schedules; all get the result, which is that of one
            process, bit for bit. None does all here.

    Raises:
        ConfigError, RequestError, BackendUnavailable: as for a run.
        RankError: another rank is lost.
    """
    request.check()
    began = time.perf_counter()
    base = choose_setting(bundle, None, {}, warn)
    uncached = choose_setting(bundle, "off", {}, warn).cache
    asked = [
        GenerationRequest(
            prompt=prompt,
            cache=uncached,
            defaults=base.generation,
            steps=request.steps,
            guidance_scale=request.guidance,
            seed=request.first_seed + index,
        )
        for index, prompt in enumerate(request.prompts)
    ]
    for run in asked:
        run.check()
    check_recordable(bundle)
    fitted = len(asked) - request.hold_out
    runs, held_out = asked[:fitted], asked[fitted:]
    generator = Generator(bundle, backend=request.backend, options=request.options)
    model = generator.transformer.session.model
    recorder = GramRecorder(model, window=request.window)
    steps = runs[0].value("steps")
    ahead = model_runs(
        len(runs),
        request.speedups,
        request.refine,
        request.search,
        steps,
        paths=request.paths,
        hold_out=request.hold_out,
    )
    tell(f"about {ahead} model runs, cached ones counted by what they compute")
    progress.phase("calibrate", len(request.prompts))
    shares = Shares(ranks)
    pieces = Pieces(request, _identity(bundle, model, request), [_facts(run) for run in runs])
    own: dict[int, bytes] = {}
    has_told = False
    for index, run in enumerate(runs):
        if not shares.is_mine(index):
            continue
        kept = pieces.run(index)
        if kept is None:
            result = generator.generate(
                run, recorder=recorder, on_step=lambda done, total: shares.beat()
            )
            kept = recorder.end_run().to_bytes()
            pieces.keep_run(index, kept)
            if not has_told and ahead > 1:
                each, has_told = result.seconds["denoise"], True
                rest = duration(each * (ahead - 1) / shares.size)
                tell(f"one took {duration(each)}: about {rest} to go")
        own[index] = kept
        progress.advance(run.prompt or "")
    if pieces.found:
        tell(f"{pieces.found} of {len(runs)} runs were recorded before: going on from them")
    recorder.runs = [
        RecordedRun.from_bytes(content, model.device)
        for content in shares.gather(own, "gathering recorded runs")
    ]
    resolved = generator.values(runs[0])
    if resolved["steps"] <= FEW_STEPS:
        warn(few_steps_advice(resolved["steps"]))
    common = _common(resolved, base.generation.model_dump())
    table = sampler_table(bundle, recorder.tables["timesteps"])
    if table is None and request.refine:
        warn("the bundle has no sampler table for this run, so solved mixes are not refined")
    scale = resolved["guidance_scale"]
    configs, left_out, lockstep = solved_configs(
        model, recorder, request, table, scale, common, progress, shares, pieces
    )
    if held_out:
        configs = _held_out(generator, held_out, configs, progress, shares, pieces)
    fits = polynomials(recorder, warn)
    found, missing = threshold_configs(model, recorder, fits, request.speedups, common, lockstep)
    about = {
        "checkpoint": bundle.manifest.checkpoint.source,
        "steps": resolved["steps"],
        "guidance_scale": resolved["guidance_scale"],
        "size": [resolved["height"], resolved["width"], resolved["frames"]],
        "prompts": list(request.prompts),
        "held_out": request.hold_out,
        "first_seed": request.first_seed,
        "seconds": round(time.perf_counter() - began, 1),
    }
    configs |= found
    timesteps = torch.from_numpy(recorder.tables["timesteps"])
    told = {name: _told(model, timesteps, config) for name, config in configs.items()}
    return Calibration(configs, fits, {**left_out, **missing}, told, about)


def _told(model: Model, timesteps: torch.Tensor, config: CachingConfig) -> Told:
    setting = config.setting()
    known = setting.policy in model.manifest.policies
    ahead = forecast(model, timesteps, setting) if known else None
    decided = None if ahead is None else [d.compute for d in next(iter(ahead.branches.values()))]
    distances: dict[str, float] = {}
    if isinstance(config, SolvedConfig):
        distances = (config.solved_from or {}).get("distance_db", {})
    count = str(getattr(config, "computed_steps", None))
    return Told(decided, -distances[count] if count in distances else None)


def _held_out(
    generator: Generator,
    runs: Sequence[GenerationRequest],
    configs: dict[str, CachingConfig],
    progress: Progress,
    shares: Shares,
    pieces: Pieces,
) -> dict[str, CachingConfig]:
    """Run what nothing was fitted on with every schedule, and have these tell their quality."""
    solved = configs.get("solved")
    if not isinstance(solved, SolvedConfig):
        raise RequestError(
            "--hold-out",
            "finds no schedules to run",
            "calibrate with more steps, or fewer than 200",
        )
    progress.phase("hold out", len(runs))
    own: dict[int, Any] = {}
    for index, run in enumerate(runs):
        if shares.is_mine(index):
            facts = [_facts(run), solved.model_dump(mode="json")]
            own[index] = pieces.json(f"held-out-{index:04}", facts)
            if own[index] is None:
                own[index] = held_out_psnr(
                    generator, run, solved, lambda done, total: shares.beat()
                )
                pieces.keep_json(f"held-out-{index:04}", facts, own[index])
            progress.advance(run.prompt or "")
    return with_psnr(configs, shares.gather_json(own, "gathering held-out runs"))


def _identity(bundle: Bundle, model: Model, request: CalibrationRequest) -> list[Any]:
    """Return what every recorded run depends on."""
    return [facts_of(bundle, model.backend.name), request.window]


def _facts(run: GenerationRequest) -> dict[str, str]:
    return {name: str(value) for name, value in vars(run).items()}


def few_steps_advice(steps: int) -> str:
    """Say what caching does to a run of so few steps."""
    return (
        f"{steps} steps are so few that neighbours differ much: a few-step or distilled checkpoint "
        "gains little from caching and loses quality; run it uncached, or look at every frame"
    )


def _common(resolved: dict[str, Any], generation: dict[str, Any]) -> dict[str, Any]:
    """Return the generation keys of every config."""
    return {
        "infer_steps": resolved["steps"],
        "target_video_length": resolved["frames"],
        "target_height": resolved["height"],
        "target_width": resolved["width"],
        "text_len": generation["text_tokens"],
        "sample_guide_scale": float(resolved["guidance_scale"]),
        "sample_shift": generation["flow_shift"],
        "enable_cfg": resolved["guidance_scale"] != 1,
        "seed": generation["seed"],
        **({} if generation["sampler"] is None else {"sampler": generation["sampler"]}),
    }
