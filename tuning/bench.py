# SPDX-License-Identifier: Apache-2.0
"""Speed and quality of cache settings against the uncached run, interleaved in one process.

Every round runs all settings once on one prompt and seed pair, so that a drift of the machine's
speed touches them alike; a speedup is the median over rounds of that round's ratio. The pairs take
turns, and each is run equally often.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import torch
from numpy.typing import NDArray

from ..bundle.manifest import ResolvedConfig
from ..bundle.reader import Bundle
from ..core.errors import RequestError
from ..core.output import check_folder, write_text
from ..core.progress import Progress
from ..policies.setting import CacheSetting
from ..runtime.distributed.ranks import Ranks
from ..runtime.model import DeviceOptions
from ..runtime.pipeline.generate import Generation, Generator
from ..runtime.pipeline.request import GenerationRequest
from ..runtime.pipeline.video import contact_sheet, write_video
from ..runtime.settings import choose_setting
from .moving_picture import Panel, moving_picture
from .quality import Quality, compare_videos
from .shares import Shares
from .table import markdown_table, spread_cell

__all__ = [
    "UNCACHED",
    "BenchReport",
    "BenchRequest",
    "BenchRow",
    "bench_bundle",
    "read_prompts",
    "short_names",
]

UNCACHED, EAGER = "uncached", "diffusers eager"
WARM_UP_STEPS = 2

DISAGREEMENT = 0.25
"""Spread of a speedup over rounds, relative to its median, beyond which its rounds disagree."""


@dataclass(frozen=True)
class BenchRequest:
    """What to measure.

    Attributes:
        prompts: Prompts; each with every seed.
        seeds: Seeds of the initial noise.
        caches: Config or policy names, or settings by the name they are to go by; None takes all
            configs that the bundle carries.
        rounds: Interleaved rounds at least; raised to a multiple of the prompt and seed pairs.
        steps: Denoise steps; None takes the config's.
        eager: Also time the plain diffusers pipeline on the bundle's checkpoint.
        backend: Name of a backend; None takes the bundle's first.
        options: How engines are driven; None drives them plainly.
        out: Folder for tables, videos and the contact sheet, or None.
        image: First frame of every video, for image-to-video.
    """

    prompts: Sequence[str]
    seeds: Sequence[int]
    caches: Sequence[str] | Mapping[str, CacheSetting] | None = None
    rounds: int = 3
    steps: int | None = None
    eager: bool = False
    backend: str | None = None
    options: DeviceOptions | None = None
    out: Path | None = None
    image: Path | None = None

    def check(self) -> None:
        """Refuse what can't be measured or written, before anything is loaded.

        Raises:
            RequestError: no prompt, no seed, or less than one round.
            OutputError: ``out`` is a file or can't be written.
        """
        if not self.prompts:
            raise RequestError("bench", "has no prompt", "give --prompt or --prompts FILE")
        if not self.seeds:
            raise RequestError("--seeds", "asks for no seed", "give --seeds 1 or more")
        if self.rounds < 1:
            raise RequestError(f"--rounds {self.rounds}", "is below 1", "use 3 or more")
        if self.out is not None:
            check_folder(self.out, "--out")

    def pairs(self) -> list[tuple[str, int]]:
        """Return every prompt with every seed."""
        return [(p, s) for p in self.prompts for s in self.seeds]

    def round_count(self) -> int:
        """Return the rounds that are run: at least ``rounds``, each pair equally often."""
        pairs = len(self.pairs())
        return pairs * -(-self.rounds // pairs)


@dataclass
class BenchRow:
    """Measurements of one setting over all rounds.

    Attributes:
        name: Config or policy name.
        computed_steps: Computed steps of a branch, mean over runs.
        seconds: Denoise seconds of each round.
        speedup: Uncached seconds / these seconds, of each round.
        ideal: Ideal speedup, mean over runs.
        quality: PSNR and SSIM against the uncached run, per prompt and seed.
    """

    name: str
    computed_steps: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    speedup: list[float] = field(default_factory=list)
    ideal: list[float] = field(default_factory=list)
    quality: list[Quality] = field(default_factory=list)

    def add(self, measured: Mapping[str, Any]) -> None:
        """Take one run, as `_measured` gives it."""
        self.seconds.append(measured["seconds"])
        self.speedup.append(measured["speedup"])
        self.computed_steps.append(measured["computed"])
        self.ideal.append(measured["ideal"])
        if measured["quality"] is not None:
            self.quality.append(Quality(*measured["quality"]))

    def spread(self) -> list[float] | None:
        """Return the least and greatest speedup of a round; None of one round."""
        return [min(self.speedup), max(self.speedup)] if len(self.speedup) > 1 else None

    def doubts(self) -> list[str]:
        """Return why the measured speedup is not to be trusted: rounds disagree, or above ideal."""
        speedup, ideal = float(np.median(self.speedup)), float(np.mean(self.ideal))
        least, most = self.spread() or (speedup, speedup)
        advice = f"measure again on an idle machine with --rounds {2 * len(self.speedup) + 1}"
        found = []
        if most - least > DISAGREEMENT * speedup:
            found.append(
                f"'{self.name}': rounds disagree, from {least:.2f} to {most:.2f} times; {advice}"
            )
        if speedup - ideal > most - least:
            spread = f"the spread of {most - least:.2f}" if self.spread() else "one round explains"
            found.append(
                f"'{self.name}': a measured speedup of {speedup:.2f} exceeds the ideal {ideal:.2f} by "
                f"more than {spread}; {advice}"
            )
        return found

    def as_dict(self) -> dict[str, Any]:
        """Return medians, means, worst cases, and the spread over rounds."""
        speedup, ideal = float(np.median(self.speedup)), float(np.mean(self.ideal))
        psnr = [q.psnr for q in self.quality if q.psnr is not None]
        ssim = [q.ssim for q in self.quality]
        return {
            "name": self.name,
            "computed_steps": float(np.mean(self.computed_steps)),
            "seconds": float(np.median(self.seconds)),
            "speedup": speedup,
            "speedup_spread": self.spread(),
            "ideal_speedup": ideal,
            "efficiency": speedup / ideal,
            "psnr_mean": float(np.mean(psnr)) if psnr else None,
            "psnr_worst": min(psnr, default=None),
            "ssim_mean": float(np.mean(ssim)) if ssim else None,
            "ssim_worst": min(ssim, default=None),
        }


@dataclass(frozen=True)
class BenchReport:
    """The whole table.

    Attributes:
        steps: Denoise steps.
        rounds: Interleaved rounds.
        pairs: Prompt and seed pairs.
        backend: Name of the backend.
        precision: Of the body.
        entries: One row per setting, as `BenchRow.as_dict` has it.
        pictures: Frames of the first pair by setting, the uncached run's first.
        decisions: Whether each step of the first pair was computed, by setting and branch.
        ranks: Processes that measured at once.
    """

    steps: int
    rounds: int
    pairs: int
    backend: str
    precision: str
    entries: list[dict[str, Any]]
    pictures: dict[str, NDArray[np.uint8]] = field(default_factory=dict, repr=False)
    decisions: dict[str, dict[str, list[bool | None]]] = field(default_factory=dict, repr=False)
    ranks: int = 1

    columns = (
        "setting", "computed", "seconds", "speedup", "spread", "ideal", "efficiency",
        "PSNR dB", "worst", "SSIM", "worst",
    )  # fmt: skip

    def rows(self) -> list[list[Any]]:
        """Return the table's cells."""
        keys = ("ideal_speedup", "efficiency")
        quality = ("psnr_mean", "psnr_worst", "ssim_mean", "ssim_worst")
        return [
            [
                e["name"],
                f"{e['computed_steps']:g} of {self.steps}",
                e["seconds"],
                e["speedup"],
                spread_cell(e["speedup_spread"]),
                *(e[k] for k in keys),
                *(None if e[k] is None else round(e[k], 1 if "psnr" in k else 4) for k in quality),
            ]
            for e in self.entries
        ]

    def markdown(self) -> str:
        """Return the table as Markdown."""
        return markdown_table(self.columns, self.rows())

    def as_dict(self) -> dict[str, Any]:
        """Return what ``bench --json`` prints."""
        return {
            "steps": self.steps,
            "rounds": self.rounds,
            "pairs": self.pairs,
            "backend": self.backend,
            "precision": self.precision,
            "concurrent_ranks": self.ranks,
            "settings": self.entries,
        }


def read_prompts(path: Path) -> list[str]:
    """Read one prompt per line; blank lines and lines that begin with # are left out.

    Raises:
        RequestError: the file can't be read or holds none.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(
            f"--prompts '{path}'", f"can't be read: {error}", "give a text file"
        ) from error
    prompts = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not prompts:
        raise RequestError(f"--prompts '{path}'", "holds no prompt", "write one prompt per line")
    return prompts


def short_names(caches: Sequence[str]) -> dict[str, str]:
    """Return what was asked for by the name that tables, strips and files of a report give it.

    ``folder/calibration.json#solved_2x`` is `solved_2x` where no other has that name, then
    `calibration#solved_2x`, and itself where that isn't enough.
    """

    def forms(cache: str) -> tuple[str, ...]:
        path, _, part = cache.partition("#")
        stem = Path(path).stem if path.endswith(".json") else path
        return (part or stem, f"{stem}#{part}" if part else stem, cache)

    different = list(dict.fromkeys(caches))
    counts = Counter(name for cache in different for name in set(forms(cache)))
    return {next((n for n in forms(c) if counts[n] == 1), c): c for c in different}


def bench_bundle(
    bundle: Bundle,
    request: BenchRequest,
    progress: Progress,
    warn: Callable[[str], None],
    ranks: Ranks | None = None,
) -> BenchReport:
    """Measure; see the module.

    Args:
        bundle: An open bundle.
        request: What to measure.
        progress: Shown each run.
        warn: Told what a user would want to know.
        ranks: Processes that share the rounds, all at once; all get the report, the first alone
            the pictures. None runs them all here.

    Raises:
        ConfigError, RequestError, BackendUnavailable: as for a run.
        OutputError: ``request.out`` can't be written.
        RankError: another rank is lost.
    """
    request.check()
    wanted = request.caches or list(bundle.manifest.configs)
    named = wanted if isinstance(wanted, Mapping) else short_names(wanted)
    settings = {n: choose_setting(bundle, c, {}, warn) for n, c in named.items()}
    settings = {n: s for n, s in settings.items() if s.cache.policy != "off"}
    base = choose_setting(bundle, None, {}, warn)
    uncached = ResolvedConfig(
        cache=choose_setting(bundle, "off", {}, warn).cache, generation=base.generation
    )
    pairs, rounds = request.pairs(), request.round_count()
    for pair in pairs:
        _request(pair, uncached, request.steps, request.image).check()
    generator = Generator(bundle, backend=request.backend, options=request.options)
    eager = _EagerPipeline(generator) if request.eager else None

    shares = Shares(ranks)
    names = [UNCACHED, *settings, *((EAGER,) if eager else ())]
    progress.phase("bench", rounds * len(names) + 1)

    def run(wanted: GenerationRequest) -> Generation:
        return generator.generate(wanted, on_step=lambda done, total: shares.beat())

    for entry in (uncached, *settings.values()):
        run(_request(pairs[0], entry, WARM_UP_STEPS, request.image))
    progress.advance("warm-up")
    own: dict[int, Any] = {}
    pictures: dict[str, NDArray[np.uint8]] = {}
    for index in range(rounds):
        if not shares.is_mine(index):
            continue
        pair, is_new = pairs[index % len(pairs)], index < len(pairs)
        plain = _request(pair, uncached, request.steps, request.image)
        reference = run(plain)
        measured = {UNCACHED: _measured(reference, reference, is_new=False)}
        progress.advance(UNCACHED)
        if index == 0:
            pictures[UNCACHED] = reference.frames
        for name, entry in settings.items():
            result = run(_request(pair, entry, request.steps, request.image))
            measured[name] = _measured(result, reference, is_new=is_new)
            progress.advance(name)
            if index == 0:
                pictures[name] = result.frames
        if eager is not None:
            measured[EAGER] = _measured(eager.generate(plain), reference, is_new=is_new)
            # The plain pipeline computes every step and fills no statistics of ours.
            measured[EAGER] |= {n: measured[UNCACHED][n] for n in ("steps", "computed", "ideal")}
            progress.advance(EAGER)
        own[index] = measured
    found = shares.gather_json(own, "gathering rounds")
    rows = {n: BenchRow(n) for n in names}
    for measured in found:
        for name, values in measured.items():
            rows[name].add(values)
    for row in rows.values():
        if row.name != EAGER:  # another program, which no ideal of ours bounds
            for doubt in row.doubts():
                warn(doubt)
    if shares.size > 1:
        warn(f"{shares.size} ranks took the times at once: they hold where each has its own device")
    report = BenchReport(
        found[0][UNCACHED]["steps"],
        rounds,
        len(pairs),
        generator.transformer.session.model.backend.name,
        bundle.manifest.precision,
        [r.as_dict() for r in rows.values()],
        pictures,
        {n: found[0][n]["decisions"] for n in (UNCACHED, *settings)},
        shares.size,
    )
    if request.out is not None and shares.leads:
        _write(request.out, report)
    return report


def _request(
    pair: tuple[str, int], entry: ResolvedConfig, steps: int | None, image: Path | None
) -> GenerationRequest:
    prompt, seed = pair
    return GenerationRequest(
        prompt=prompt,
        cache=entry.cache,
        defaults=entry.generation,
        seed=seed,
        steps=steps,
        image=image,
    )


def _measured(result: Generation, reference: Generation, *, is_new: bool) -> dict[str, Any]:
    """Return what one run gives a row, as JSON."""
    statistics = result.statistics
    quality = compare_videos(result.frames, reference.frames) if is_new else None
    return {
        "steps": statistics.steps,
        "seconds": result.seconds["denoise"],
        "speedup": result.speedup_over(reference),
        "computed": statistics.computed_steps,
        "ideal": statistics.ideal_speedup,
        "quality": None if quality is None else [quality.psnr, quality.ssim],
        "decisions": {n: b.computed for n, b in statistics.branches.items()},
    }


class _EagerPipeline:
    """The same pipeline with diffusers' own transformer, for a peer's time."""

    def __init__(self, generator: Generator) -> None:
        import diffusers

        checkpoint = generator.bundle.manifest.checkpoint
        folder = Path(checkpoint.source)
        subfolder = "transformer" if (folder / "transformer").is_dir() else None
        transformer_class = getattr(diffusers, checkpoint.transformer_class)
        dtype = getattr(torch, generator.bundle.manifest.precision)
        try:
            self._model = transformer_class.from_pretrained(
                checkpoint.source,
                subfolder=subfolder,
                torch_dtype=dtype,
                revision=checkpoint.revision,
            )
        except OSError as error:
            raise RequestError(
                "--eager",
                f"the checkpoint at '{checkpoint.source}' can't be loaded: {error}",
                "run where the bundle was built",
            ) from error
        self._generator = generator

    def generate(self, request: GenerationRequest) -> Generation:
        """Run with the plain transformer in the attached one's place."""
        pipe, attached = self._generator.pipe, self._generator.transformer.module
        pipe.transformer = self._model
        try:
            return self._generator.generate(request)
        finally:
            pipe.transformer = attached


def _write(folder: Path, report: BenchReport) -> None:
    hint = "choose another --out"
    write_text(folder / "bench.json", json.dumps(report.as_dict(), indent=1), hint)
    title = (
        f"{report.steps} steps, {report.backend}, {report.precision}, "
        f"{report.pairs} prompt and seed pairs, {report.rounds} rounds of one pair each"
        + (f", {report.ranks} ranks at once" if report.ranks > 1 else "")
    )
    write_text(folder / "bench.md", f"{title}\n\n{report.markdown()}\n", hint)
    for name, frames in report.pictures.items():
        stem = quote(name, safe="+")  # a name may be a path
        write_video(frames, folder / f"{stem}.mp4")
        write_video(frames, folder / f"{stem}.gif")
    write_video(contact_sheet(report.pictures)[None], folder / "contact_sheet.png")
    write_video(moving_picture(_panels(report)), folder / "comparison.webp")


def _panels(report: BenchReport) -> list[Panel]:
    """Return the settings that have a video, the uncached run first."""
    entries = {entry["name"]: entry for entry in report.entries}
    return [
        Panel(
            name,
            frames,
            next(iter(report.decisions[name].values())),
            entries[name]["seconds"],
            entries[name]["speedup"],
        )
        for name, frames in report.pictures.items()
    ]
