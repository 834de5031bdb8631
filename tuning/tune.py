# SPDX-License-Identifier: Apache-2.0
"""Find the setting for a wanted speedup or quality: candidates by replay, the best by real runs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from ..bundle.manifest import ResolvedConfig
from ..bundle.reader import Bundle
from ..configs.load import read_configs
from ..core.errors import RequestError, nearest
from ..core.output import write_text
from ..core.progress import Progress
from ..policies.adacache import CODEBOOKS, AdaCacheConfig
from ..policies.config import CachingConfig
from ..policies.custom import DAMPED, CustomConfig
from ..policies.magcache import MagCacheConfig
from ..policies.solved import SolvedConfig
from ..policies.taylorseer import TaylorSeerConfig
from ..policies.teacache import TeaCacheConfig
from ..runtime.distributed.ranks import Ranks
from ..runtime.model import DeviceOptions
from ..runtime.pipeline.generate import Generator, check_recordable
from ..runtime.pipeline.request import GenerationRequest
from ..runtime.settings import choose_setting, config_entry, other_size
from .bench import BenchRequest, bench_bundle
from .replay import replay
from .shares import Shares
from .table import spread_cell
from .trace import Trace, TraceRecorder

__all__ = ["Candidate", "Goal", "TuneReport", "TuneRequest", "calibrated", "save_config", "tune"]

THRESHOLDS = tuple(float(round(t, 4)) for t in np.geomspace(0.02, 2.0, 24))
INTERVALS = range(2, 9)

CRITERIA = ("mean", "worst")

EXAMPLES = {
    "--target-speedup": "--target-speedup 2",
    "--min-psnr": "--min-psnr 30",
    "--min-ssim": "--min-ssim 0.95",
}


@dataclass(frozen=True)
class Goal:
    """What the chosen setting has to reach; exactly one is given.

    Attributes:
        speedup: Measured, against the uncached run.
        psnr: PSNR of the frames against the uncached run's, dB.
        ssim: SSIM, 0 to 1.
        criterion: Which PSNR or SSIM counts: the ``mean`` over prompts, or the ``worst``.
    """

    speedup: float | None = None
    psnr: float | None = None
    ssim: float | None = None
    criterion: str = "mean"

    def __post_init__(self) -> None:
        if self.criterion not in CRITERIA:
            raise RequestError(
                f"--criterion '{self.criterion}'",
                "is not known",
                nearest(self.criterion, list(CRITERIA)),
            )
        options = {
            "--target-speedup": self.speedup,
            "--min-psnr": self.psnr,
            "--min-ssim": self.ssim,
        }
        given = {option: value for option, value in options.items() if value is not None}
        if len(given) != 1:
            found = f"has several goals, {' and '.join(given)}" if given else "has no goal"
            raise RequestError("tune", found, f"give one of {', '.join(options)}")
        ((option, value),) = given.items()
        if not 0 < value < math.inf or (option == "--min-ssim" and value > 1):
            raise RequestError(f"{option} {value}", "can't be reached", f"try {EXAMPLES[option]}")

    def is_met(self, row: Mapping[str, Any]) -> bool:
        """Tell whether a measured row reaches the goal."""
        if self.speedup is not None:
            return bool(row["speedup"] >= self.speedup)
        name, least = ("psnr", self.psnr) if self.psnr is not None else ("ssim", self.ssim)
        found = row[f"{name}_{self.criterion}"]
        return found is not None and found >= least

    def rank(self, row: Mapping[str, Any]) -> float:
        """Return what is left to maximise once the goal is met: quality, or speed."""
        if self.speedup is not None:
            psnr = row[f"psnr_{self.criterion}"]
            return float(psnr if psnr is not None else np.inf)
        return float(row["speedup"])


@dataclass(frozen=True)
class Candidate:
    """One config and what replay foretells of it.

    Attributes:
        name: Policy and parameters.
        config: The caching config.
        ideal_speedup: Steps / computed steps, mean over traces.
        error: Root mean square over steps of the reuse error, mean over traces and branches.
    """

    name: str
    config: CachingConfig
    ideal_speedup: float
    error: float


@dataclass(frozen=True)
class TuneRequest:
    """What to search and to confirm.

    Attributes:
        goal: What to reach.
        prompts: The first ``traces`` are recorded and replayed, the others confirm.
        traces: Prompts recorded.
        calibration: File that `calibrate` wrote, whose configs and coefficients join the search.
        confirm: Candidates that real runs confirm, at most.
        rounds: Timed runs of each, at least; raised to a multiple of the confirming prompts.
        steps: Denoise steps; None takes the default config's.
        backend: Name of a backend; None takes the bundle's first.
        options: How engines are driven; None drives them plainly.
    """

    goal: Goal
    prompts: Sequence[str]
    traces: int = 2
    calibration: Path | None = None
    confirm: int = 8
    rounds: int = 3
    steps: int | None = None
    backend: str | None = None
    options: DeviceOptions | None = None

    def __post_init__(self) -> None:
        for name in ("traces", "confirm", "rounds"):
            if getattr(self, name) < 1:
                raise RequestError(
                    f"--{name} {getattr(self, name)}", "is below 1", f"try --{name} 2"
                )


@dataclass(frozen=True)
class TuneReport:
    """The table, and what was chosen from it.

    Attributes:
        candidates: All, as replay ranks them.
        rows: Measured rows of the confirmed ones, as ``bench`` has them.
        chosen: Name of the chosen one, or None where none reaches the goal.
        rank_correlation: Spearman's, between foretold errors and measured PSNR; None below three.
        held_out: Whether other prompts confirmed than were replayed.
    """

    candidates: list[Candidate]
    rows: list[dict[str, Any]]
    chosen: str | None
    rank_correlation: float | None
    held_out: bool
    configs: dict[str, CachingConfig] = field(repr=False)

    columns = (
        "policy and parameters",
        "computed",
        "speedup",
        "spread",
        "PSNR dB",
        "worst",
        "SSIM",
        "worst",
        "",
    )

    def table(self) -> list[list[Any]]:
        """Return the confirmed rows by speedup; `*` marks the Pareto front, `<` the choice."""
        rows = sorted(self.rows, key=lambda r: float(r["speedup"]))
        return [
            [
                r["name"],
                f"{r['computed_steps']:g}",
                round(r["speedup"], 2),
                spread_cell(r["speedup_spread"]),
                *(
                    None if r[k] is None else round(r[k], 1 if "psnr" in k else 4)
                    for k in ("psnr_mean", "psnr_worst", "ssim_mean", "ssim_worst")
                ),
                ("*" if _is_best(r, rows) else "") + ("<" if r["name"] == self.chosen else ""),
            ]
            for r in rows
        ]

    def as_dict(self) -> dict[str, Any]:
        """Return what ``tune --json`` prints."""
        return {
            "chosen": self.chosen,
            "held_out": self.held_out,
            "rank_correlation": self.rank_correlation,
            "confirmed": self.rows,
            "candidates": [
                {"name": c.name, "ideal_speedup": c.ideal_speedup, "reuse_error": c.error}
                for c in self.candidates
            ],
        }


def tune(
    bundle: Bundle,
    request: TuneRequest,
    progress: Progress,
    warn: Callable[[str], None],
    ranks: Ranks | None = None,
) -> TuneReport:
    """Search by replay and confirm by running.

    Args:
        bundle: An open bundle.
        request: Goal, prompts and bounds.
        progress: Shown each run.
        warn: Told where prompts are too few to hold any out, and of speedups not to be trusted.
        ranks: Processes that share recorded prompts, with the replays of every candidate on them,
            and the rounds that confirm; all get the report. None does all here.

    Raises:
        ConfigError, RequestError, BackendUnavailable: as for a run.
        RankError: another rank is lost.
    """
    check_recordable(bundle)
    replayed, confirming = request.prompts[: request.traces], request.prompts[request.traces :]
    if not confirming:
        warn("too few prompts to hold any out: those that were replayed confirm as well")
        confirming = replayed
    base = choose_setting(bundle, None, {}, warn)
    runs = _uncached_runs(bundle, request, replayed, base)
    space = _search_space(bundle, request, warn)
    shares = Shares(ranks)
    traces = _record(bundle, request, runs, progress, shares)
    candidates = _candidates(bundle, space, traces, shares)
    tried = _worth_running(candidates, request.goal, request.confirm)
    if not tried:
        raise RequestError(
            "--target-speedup",
            f"{request.goal.speedup:g} is beyond every candidate, the fastest of which "
            f"has an ideal speedup of {max(c.ideal_speedup for c in candidates):.2f}",
            "ask for less",
        )
    bench = BenchRequest(
        prompts=confirming,
        seeds=[0],
        caches={c.name: c.config.setting() for c in tried},
        rounds=request.rounds,
        steps=request.steps,
        backend=request.backend,
        options=request.options,
    )
    rows = bench_bundle(bundle, bench, progress, warn, ranks).entries[1:]
    met = [r for r in rows if request.goal.is_met(r)]
    chosen = max(met, key=request.goal.rank)["name"] if met else None
    return TuneReport(
        candidates,
        rows,
        chosen,
        _rank_correlation(tried, rows),
        len(request.prompts) > request.traces,
        {c.name: c.config for c in tried},
    )


def save_config(config: CachingConfig, path: Path) -> None:
    """Write a config as a JSON file, whole or not at all.

    Raises:
        OutputError: it can't be written.
    """
    text = json.dumps(config.model_dump(exclude_none=True, mode="json"))
    write_text(path, text + "\n", "choose another --out")


def _uncached_runs(
    bundle: Bundle, request: TuneRequest, prompts: Sequence[str], base: ResolvedConfig
) -> list[GenerationRequest]:
    """Return a checked request per replayed prompt."""
    uncached = choose_setting(bundle, "off", {}, lambda text: None).cache
    runs = [
        GenerationRequest(
            prompt=prompt, cache=uncached, defaults=base.generation, steps=request.steps, seed=seed
        )
        for seed, prompt in enumerate(prompts)
    ]
    for run in runs:
        run.check()
    return runs


def _record(
    bundle: Bundle,
    request: TuneRequest,
    runs: Sequence[GenerationRequest],
    progress: Progress,
    shares: Shares,
) -> dict[int, Trace]:
    """Run this rank's replayed prompts uncached; traces by prompt."""
    generator = Generator(bundle, backend=request.backend, options=request.options)
    progress.phase("record", len(runs))
    traces = {}
    for index, run in enumerate(runs):
        if shares.is_mine(index):
            recorder = TraceRecorder()
            generator.generate(run, recorder=recorder, on_step=lambda done, total: shares.beat())
            traces[index] = recorder.trace()
        progress.advance(run.prompt or "")
    return traces


def _candidates(
    bundle: Bundle,
    space: Mapping[str, CachingConfig],
    traces: Mapping[int, Trace],
    shares: Shares,
) -> list[Candidate]:
    """Replay every candidate that the bundle and the traces allow, and drop equal ones.

    A trace is replayed where it was recorded: it is large, and what replays tell of it is not.
    """
    known = {n: c for n, c in space.items() if c.setting().policy in bundle.manifest.policies}
    own: dict[int, list[Any]] = {}
    for index, trace in traces.items():
        own[index] = []
        for config in known.values():
            told = replay(trace, config.setting())
            rows = [branch.mix for branch in told.branches.values()]
            own[index].append([rows, told.ideal_speedup, told.error])
            shares.beat()
    by_trace = shares.gather_json(own, "gathering replays")
    found: dict[str, Candidate] = {}
    for place, (name, config) in enumerate(known.items()):
        mixes, ideals, errors = zip(*(figures[place] for figures in by_trace), strict=True)
        # Equal masks of one policy on these traces are one candidate.
        key = json.dumps([config.setting().policy, [mix for trace in mixes for mix in trace]])
        ideal = float(np.mean(ideals))
        if ideal > 1 and key not in found:
            found[key] = Candidate(name, config, ideal, float(np.mean(errors)))
    return sorted(found.values(), key=lambda c: (c.ideal_speedup, c.error))


def _search_space(
    bundle: Bundle, request: TuneRequest, warn: Callable[[str], None]
) -> dict[str, CachingConfig]:
    """Return configs by name: sweeps of every policy, and what a calibration adds."""
    found = calibrated(bundle, request, warn)
    polynomials: dict[str, Any] = {"identity": [[1.0, 0.0]]}
    ratios: dict[str, Any] | None = None
    space: dict[str, CachingConfig] = {}
    for name, config in found.items():
        if isinstance(config, TeaCacheConfig):
            polynomials = {"fitted": config.coefficients}
        if isinstance(config, MagCacheConfig):
            ratios = {"magcache_ratios": config.magcache_ratios, "magcache_retention": 0.1}
        if isinstance(config, SolvedConfig):
            budgets = [len(schedule.computed) for schedule in config.schedules]
            for count in budgets if len(budgets) > 1 else ():
                chosen = config.model_copy(update={"computed_steps": count})
                space[f"{name} computed_steps={count}"] = chosen
            if len(budgets) == 1:
                space[name] = config
    for threshold in THRESHOLDS:
        for kind, sets in polynomials.items():
            keys = {"teacache_thresh": threshold, "coefficients": sets, "use_ret_steps": False}
            space[f"teacache {kind} threshold={threshold:g}"] = TeaCacheConfig.model_validate(keys)
            space[f"custom {kind} threshold={threshold:g}"] = CustomConfig.model_validate(
                keys | DAMPED
            )
        if ratios is not None:
            keys = {"magcache_thresh": threshold, "magcache_K": 8, **ratios}
            space[f"magcache threshold={threshold:g}"] = MagCacheConfig.model_validate(keys)
    for interval in INTERVALS:
        for order in (1, 2):
            name = f"taylorseer interval={interval} order={order}"
            space[name] = TaylorSeerConfig(interval=interval, order=order)
    for codebook in CODEBOOKS:
        space[f"adacache codebook={codebook}"] = AdaCacheConfig.model_validate(
            {"codebook": codebook}
        )
    return space


def calibrated(
    bundle: Bundle, request: TuneRequest, warn: Callable[[str], None]
) -> dict[str, CachingConfig]:
    """Read the calibration, and warn once where it was made at another size than the bundle's."""
    if request.calibration is None:
        return {}
    configs = read_configs(request.calibration)
    sizes = [other_size(bundle.manifest, config_entry(c).generation) for c in configs.values()]
    found = next((s for s in sizes if s is not None), None)
    if found is not None:
        warn(f"calibration '{request.calibration}' {found}: calibrate at the size that is to run")
    return configs


def _worth_running(candidates: Sequence[Candidate], goal: Goal, most: int) -> list[Candidate]:
    """Pick what to confirm.

    For a speedup: of those at least that fast by their ideal, the least errors, every policy's best
    first. For a quality: the front of least error over speedup, spread over its length.
    """
    if goal.speedup is not None:
        fast = sorted(
            (c for c in candidates if c.ideal_speedup >= goal.speedup), key=lambda c: c.error
        )
        best = {c.config.policy: c for c in reversed(fast)}
        firsts = sorted(best.values(), key=lambda c: c.error)
        return [*firsts, *(c for c in fast if c not in firsts)][:most]
    front: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (-c.ideal_speedup, c.error)):
        if not front or candidate.error < front[-1].error:
            front.append(candidate)
    picks = np.unique(np.linspace(0, len(front) - 1, min(most, len(front))).round().astype(int))
    return [front[i] for i in picks]


def _rank_correlation(
    tried: Sequence[Candidate], rows: Sequence[Mapping[str, Any]]
) -> float | None:
    """Return Spearman's correlation of foretold errors with measured PSNR, its sign turned."""
    measured = {r["name"]: r["psnr_mean"] for r in rows}
    pairs = [(c.error, measured[c.name]) for c in tried if measured[c.name] is not None]
    if len(pairs) < 3:
        return None
    return -float(spearmanr(*zip(*pairs, strict=True)).statistic)


def _is_best(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> bool:
    """Tell whether no other row is both faster and better."""
    quality = row["psnr_mean"] if row["psnr_mean"] is not None else np.inf
    return not any(
        other["speedup"] > row["speedup"]
        and (other["psnr_mean"] if other["psnr_mean"] is not None else np.inf) > quality
        for other in rows
    )
