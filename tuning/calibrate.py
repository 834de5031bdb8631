# SPDX-License-Identifier: Apache-2.0
"""Record uncached runs once and derive a config for every policy and wanted speedup from them."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..bundle.reader import Bundle
from ..bundle.sampler_table import SamplerTable
from ..core.errors import RequestError, nearest
from ..core.output import write_text
from ..core.progress import Progress
from ..policies import policy_config
from ..policies.config import CachingConfig
from ..policies.custom import DAMPED, CustomConfig
from ..policies.magcache import MagCacheConfig
from ..policies.schedule import Schedule
from ..policies.solved import (
    HISTORY,
    MAXIMUM_FACTORS,
    MAXIMUM_SCHEDULES,
    MAXIMUM_STEPS,
    SolvedConfig,
    SolvedSchedule,
)
from ..policies.teacache import TeaCacheConfig
from ..runtime.distributed.ranks import Ranks, facts_of
from ..runtime.forecast.fold import forecast
from ..runtime.model import DeviceOptions, LoadedModel
from ..runtime.pipeline.generate import Generator, check_recordable
from ..runtime.pipeline.request import GenerationRequest
from ..runtime.settings import choose_setting
from ..runtime.statistics import FEW_STEPS
from .checkpoints import Checkpoints
from .effort import PRESETS, duration, model_runs
from .fit import PolynomialFit, fit_polynomial
from .gram import GramRecorder, RecordedRun
from .held_out import check_count, held_out_psnr, with_psnr
from .lockstep import Lockstep, sampler_table
from .search import OBJECTIVES, Computed, Recipe, Searched, candidates, frontier, search_count
from .sensitivity import computed_steps, measure
from .shares import Shares
from .solve import Solution, early_weights, solve

__all__ = [
    "SPEEDUPS",
    "Calibration",
    "CalibrationRequest",
    "Told",
    "calibrate",
    "save_calibration",
]

SPEEDUPS = (1.5, 2.0, 2.5, 3.0, 4.0)
"""Ideal speedups that configs are written for, unless others are asked for."""

SEARCHED_THRESHOLDS = 40
SEARCHED_HISTORY = 3
"""Residuals that schedules are searched with: a fourth would reach behind the window at long gaps."""

FEWEST_COMPUTED = 5
"""Computed steps of the first schedule of a frontier."""

SIGNALS = ("timestep_proj", "temb")
"""In the order of TeaCache's sets of coefficients: with ``use_ret_steps``, without."""


@dataclass(frozen=True)
class CalibrationRequest:
    """What to record and to solve for.

    Attributes:
        prompts: One uncached run each; the last ``hold_out`` are fitted on nothing.
        first_seed: Seed of the first prompt's noise; each further prompt takes the next.
        speedups: Ideal speedups to write configs for.
        steps: Denoise steps; None takes the bundle's default config's.
        guidance: Guidance scale; None takes the config's.
        history: Residuals that solved mixes use.
        window: Steps back that they may reach in uncached runs.
        refine: Prompts on whose cached runs solved schedules are chosen and their mixes fitted; 0
            takes both from the uncached runs.
        search: Times that every computed step of a chosen schedule is tried elsewhere, at most.
        objective: What schedules are chosen by: the prompts' ``mean``, or the ``worst`` of them.
        hold_out: Prompts that are run with every schedule, so that a request may ask for a quality.
        backend: Name of a backend; None takes the bundle's first.
        options: How engines are driven; None drives them plainly.
        checkpoints: Keeps recorded runs and found schedules, for a calibration that was ended.
    """

    prompts: Sequence[str]
    first_seed: int = 1000
    speedups: Sequence[float] = SPEEDUPS
    steps: int | None = None
    guidance: float | None = None
    history: int = HISTORY
    window: int = 16
    refine: int = PRESETS["normal"].refine
    search: int = PRESETS["normal"].search
    objective: str = "mean"
    hold_out: int = 0
    backend: str | None = None
    options: DeviceOptions | None = None
    checkpoints: Checkpoints | None = None


@dataclass(frozen=True)
class Told:
    """What a written config will do.

    Attributes:
        computed: Whether each step of a branch is computed; None where content decides.
        distance_db: Of solved schedules, the final sample's distance from the uncached one's over
            the refined prompts: −10·log₁₀ of the relative mean square, higher is nearer
            (`solved_from` has its negative). None of others, which calibration does not run.
    """

    computed: list[bool] | None
    distance_db: float | None


@dataclass(frozen=True)
class Calibration:
    """What came out.

    Attributes:
        configs: Caching configs by name, ``teacache_2x`` and the like.
        fits: TeaCache's polynomial per signal.
        left_out: Why a config that was asked for is missing, by name.
        told: Decisions and quality of each config, by name.
        about: Checkpoint, steps, guidance, size, prompts and seconds.
    """

    configs: dict[str, CachingConfig]
    fits: dict[str, PolynomialFit]
    left_out: dict[str, str]
    told: dict[str, Told]
    about: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Return what the file holds; ``--cache FILE#NAME`` reads its ``configs``."""
        return {
            "configs": {
                n: c.model_dump(exclude_none=True, mode="json") for n, c in self.configs.items()
            },
            "calibration": {
                **self.about,
                "fits": {n: vars(f) for n, f in self.fits.items()},
                "left_out": self.left_out,
            },
        }


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
    if not request.prompts:
        raise RequestError("calibrate", "has no prompt", "give --prompts FILE")
    for value in request.speedups:
        if not 1 < value < math.inf:
            raise RequestError(f"--speedup {value:g}", "is not above 1", "try --speedup 2")
    if request.objective not in OBJECTIVES:
        raise RequestError(
            f"--objective '{request.objective}'", "is not known",
            nearest(request.objective, list(OBJECTIVES)),
        )  # fmt: skip
    if not 1 <= request.history <= HISTORY:
        raise RequestError(f"--history {request.history}", f"is outside [1, {HISTORY}]", "use 3")
    check_count(request.hold_out, len(request.prompts))
    began = time.perf_counter()
    base = choose_setting(bundle, None, {}, warn)
    uncached = choose_setting(bundle, "off", {}, warn).cache
    asked = [
        GenerationRequest(
            prompt=prompt, cache=uncached, defaults=base.generation, steps=request.steps,
            guidance_scale=request.guidance, seed=request.first_seed + index,
        )
        for index, prompt in enumerate(request.prompts)
    ]  # fmt: skip
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
        len(runs), request.speedups, request.refine, request.search, steps,
        hold_out=request.hold_out,
    )  # fmt: skip
    tell(f"about {ahead} model runs, cached ones counted by what they compute")
    progress.phase("calibrate", len(request.prompts))
    shares = Shares(ranks)
    pieces = _Pieces(request, _identity(bundle, model, request), [_facts(run) for run in runs])
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
    configs, left_out, lockstep = _solved(
        model, recorder, request, table, scale, common, progress, shares, pieces
    )
    if held_out:
        configs = _held_out(generator, held_out, configs, progress, shares, pieces)
    fits = _fits(recorder, warn)
    found, missing = _by_threshold(model, recorder, fits, request.speedups, common, lockstep)
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


def _told(model: LoadedModel, timesteps: torch.Tensor, config: CachingConfig) -> Told:
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
    generator: Generator, runs: Sequence[GenerationRequest], configs: dict[str, CachingConfig],
    progress: Progress, shares: Shares, pieces: _Pieces,
) -> dict[str, CachingConfig]:  # fmt: skip
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


class _Pieces:
    """The checkpoints of one calibration; keeps nothing where there are none to keep.

    Attributes:
        found: Runs that were recorded before.
    """

    def __init__(self, request: CalibrationRequest, identity: Any, runs: list[Any]) -> None:
        self._kept, self._identity, self._runs = request.checkpoints, identity, runs
        self._solved = [request.refine, request.search, request.history, request.objective]
        self.found = 0

    def run(self, index: int) -> bytes | None:
        """Return a recorded run, if it was kept."""
        if self._kept is None:
            return None
        content = self._kept.load(f"run-{index:04}", self._identity, self._runs[index])
        self.found += content is not None
        return content

    def keep_run(self, index: int, content: bytes) -> None:
        if self._kept is not None:
            self._kept.save(content, f"run-{index:04}", self._identity, self._runs[index])

    def schedule(self, count: int) -> Any:
        """Return a found schedule, if it was kept."""
        return self.json(f"schedule-{count:04}", [self._runs, self._solved])

    def keep_schedule(self, count: int, schedule: Any) -> None:
        self.keep_json(f"schedule-{count:04}", [self._runs, self._solved], schedule)

    def json(self, name: str, facts: list[Any]) -> Any:
        """Return what was found from some facts, if it was kept."""
        content = None if self._kept is None else self._kept.load(name, self._identity, *facts)
        return None if content is None else json.loads(content)

    def keep_json(self, name: str, facts: list[Any], found: Any) -> None:
        if self._kept is not None:
            self._kept.save(json.dumps(found).encode(), name, self._identity, *facts)


def _identity(bundle: Bundle, model: LoadedModel, request: CalibrationRequest) -> list[Any]:
    """Return what every recorded run depends on."""
    return [facts_of(bundle, model.backend.name), request.window]


def _facts(run: GenerationRequest) -> dict[str, str]:
    return {name: str(value) for name, value in vars(run).items()}


def save_calibration(calibration: Calibration, path: Path) -> None:
    """Write the file whole or not at all.

    Raises:
        OutputError: it can't be written.
    """
    write_text(path, _text(calibration.as_dict()), "choose another --out")


def _text(data: dict[str, Any]) -> str:
    """Write JSON with one config per line: their tables are long and read by programs."""
    configs = [f"  {json.dumps(n)}: {json.dumps(c)}" for n, c in data["configs"].items()]
    about = json.dumps(data["calibration"], indent=1).replace("\n", "\n ")
    lines = ",\n".join(configs)
    return f'{{\n "configs": {{\n{lines}\n }},\n "calibration": {about}\n}}\n'


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


def _solved(
    model: LoadedModel,
    recorder: GramRecorder,
    request: CalibrationRequest,
    table: SamplerTable | None,
    guidance: float,
    common: dict[str, Any],
    progress: Progress,
    shares: Shares,
    pieces: _Pieces,
) -> tuple[dict[str, CachingConfig], dict[str, str], Lockstep | None]:
    grams = recorder.grams()
    factors = dict.fromkeys(grams.branches, 1.0)
    if len(grams.branches) == 2:
        factors = dict(zip(grams.branches, (guidance, 1.0 - guidance), strict=True))
    sigmas = np.append(recorder.tables["sigmas"], 0.0)
    wanted = {int(grams.steps // speedup) for speedup in request.speedups}
    starts = recorder.starts[: request.refine]
    lockstep = None
    if table is not None and starts:
        lockstep = Lockstep(
            model, starts, table, factors, history=request.history, on_step=shares.beat
        )
    fewest = min([FEWEST_COMPUTED, *wanted])
    if lockstep is None:
        solutions = solve(
            grams, factors, early_weights(sigmas), history=min(request.history, SEARCHED_HISTORY)
        )
    else:
        schedules = candidates(grams, factors, sigmas, history=request.history)
        progress.phase("solve", sum(c in wanted or c >= fewest for c in schedules))
        solutions = frontier(
            lockstep, schedules, wanted, rounds=request.search, objective=request.objective,
            fewest=fewest, done=progress.advance,
            known=_searched(lockstep, schedules, wanted, request, shares, pieces),
        )  # fmt: skip
    about = {
        "runs": grams.runs,
        "guidance_scale": guidance,
        "refined_on": len(starts) if lockstep else 0,
        "objective": request.objective,
    }
    # Of what: the weighted model output, or, once refined, the final sample in dB.
    measure = "distance_db" if lockstep else "error"

    def config(counts: Sequence[int], computed: int) -> SolvedConfig:
        errors = {str(c): round(solutions[c].error, 6) for c in counts}
        return SolvedConfig(
            **common,
            computed_steps=computed,
            schedules=[_schedule(solutions[c]) for c in counts],
            solved_from={**about, measure: errors},
        )

    configs: dict[str, CachingConfig] = {}
    left_out: dict[str, str] = {}
    counts = _storable([c for c in sorted(solutions) if c >= fewest], wanted, grams.steps, request)
    if counts:
        middle = min(counts, key=lambda count: abs(count - grams.steps / 2))
        configs["solved"] = config(counts, middle)
    for speedup in request.speedups:
        count = int(grams.steps // speedup)
        if count not in solutions or grams.steps > MAXIMUM_STEPS:
            left_out[f"solved_{speedup:g}x"] = f"no schedule of {count} computed steps was found"
            continue
        configs[f"solved_{speedup:g}x"] = config([count], count)
    return configs, left_out, lockstep


def _searched(
    lockstep: Lockstep, schedules: Mapping[int, Mapping[Recipe, Computed]], wanted: set[int],
    request: CalibrationRequest, shares: Shares, pieces: _Pieces,
) -> dict[int, Searched]:  # fmt: skip
    """Search the wanted numbers of computed steps: each rank its own, and all get all."""
    counts = sorted(wanted & set(schedules))
    own: dict[int, Any] = {}
    for index, count in enumerate(counts):
        if shares.is_mine(index):
            own[index] = pieces.schedule(count)
            if own[index] is None:
                recipe, found = search_count(
                    lockstep, schedules[count], rounds=request.search, objective=request.objective
                )
                own[index] = [list(recipe), *vars(found).values()]
                pieces.keep_schedule(count, own[index])
    gathered = shares.gather_json(own, "gathering schedules")
    return {
        count: (tuple(recipe), Solution(tuple(computed), mix, error, tuple(distances)))
        for count, (recipe, computed, mix, error, distances) in zip(counts, gathered, strict=True)
    }


def _schedule(solution: Solution) -> SolvedSchedule:
    mix = {n: [list(row) for row in rows if row] for n, rows in solution.mix.items()}
    return SolvedSchedule(computed=list(solution.computed), mix=mix)


def _storable(
    counts: Sequence[int], wanted: Collection[int], steps: int, request: CalibrationRequest
) -> list[int]:
    """Return numbers of computed steps whose schedules one config holds: all, or each so many."""
    if steps > MAXIMUM_STEPS:
        return []
    for stride in range(1, len(counts) + 1):
        kept = [c for i, c in enumerate(counts) if i % stride == 0 or c in wanted]
        factors = sum(steps - c for c in kept) * request.history
        if len(kept) <= MAXIMUM_SCHEDULES and factors <= MAXIMUM_FACTORS:
            return kept
    return []


def _fits(recorder: GramRecorder, warn: Callable[[str], None]) -> dict[str, PolynomialFit]:
    changes = [run for runs in recorder.changes.values() for run in runs]
    fits = {}
    for signal in (s for s in SIGNALS if s in recorder.tables):
        fits[signal] = fit_polynomial(recorder.tables[signal], changes)
        if fits[signal].refusal:
            warn(f"TeaCache's polynomial for '{signal}' is refused: {fits[signal].refusal}")
    return fits


def _by_threshold(
    model: LoadedModel,
    recorder: GramRecorder,
    fits: dict[str, PolynomialFit],
    speedups: Sequence[float],
    common: dict[str, Any],
    lockstep: Lockstep | None,
) -> tuple[dict[str, CachingConfig], dict[str, str]]:
    """Find, for each policy with a threshold, the least one that reaches each speedup."""
    schedule = Schedule.of(*(recorder.tables[n].tolist() for n in ("timesteps", "sigmas")))
    timesteps = torch.from_numpy(recorder.tables["timesteps"])
    ratios = {
        n: [1.0, *(round(float(r), 5) for r in np.mean(runs, axis=0))]
        for n, runs in recorder.ratios.items()
    }
    makers: dict[str, Callable[[float], CachingConfig]] = {
        "magcache": lambda t: MagCacheConfig(
            **common,
            magcache_thresh=t,
            magcache_ratios=ratios,
            magcache_K=8,
            magcache_retention=0.1,
        )
    }
    fit = fits.get("temb")
    if fit is not None and not fit.refusal:
        coefficients = [list(fit.coefficients)]
        makers["teacache"] = lambda t: TeaCacheConfig(
            **common, teacache_thresh=t, coefficients=coefficients, use_ret_steps=False
        )
        makers["custom"] = lambda t: CustomConfig(
            **common, **DAMPED, teacache_thresh=t, coefficients=coefficients, use_ret_steps=False
        )
    if lockstep is not None:
        tables = measure(lockstep, next(iter(recorder.ratios)), schedule)
        makers["sencache"] = lambda t: policy_config("sencache").model_validate(
            {
                **common,
                "threshold": t,
                "timesteps": tables.timesteps,
                "latent_sensitivity": tables.latents,
                "timestep_sensitivity": tables.timestep,
            }
        )
    configs: dict[str, CachingConfig] = {}
    left_out: dict[str, str] = {}
    for policy, make in makers.items():
        reached = []
        for threshold in np.geomspace(0.01, 4.0, SEARCHED_THRESHOLDS):
            config = make(round(float(threshold), 4))
            told = forecast(model, timesteps, config.setting())
            if told is not None:
                reached.append((told.ideal_speedup, config))
            elif lockstep is not None:  # it looks at the latents, and the uncached ones are here
                computed = computed_steps(lockstep, config.setting(), schedule)
                reached.append((len(schedule) / computed, config))
        for speedup in speedups:
            name = f"{policy}_{speedup:g}x"
            found = next((c for ideal, c in reached if ideal >= speedup), None)
            if found is None:
                best = max(ideal for ideal, _ in reached)
                left_out[name] = f"no threshold up to 4 computes so little; {best:.2f} at most"
            else:
                configs[name] = found
    return configs, left_out
