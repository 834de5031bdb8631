# SPDX-License-Identifier: Apache-2.0
"""Record a suite: uncached runs of several prompts, and how the model answers moved samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..bundle.files import cache_beside
from ..bundle.reader import Bundle
from ..core.errors import RequestError
from ..core.progress import Progress
from ..policies.schedule import Schedule
from ..policies.setting import CacheSetting, GuardSetting
from ..policies.solved import MAXIMUM_STEPS, SolvedConfig
from ..runtime.model import DeviceOptions, Model
from ..runtime.pipeline.generate import Generator
from ..runtime.pipeline.request import GenerationRequest
from ..runtime.settings import choose_setting
from ..runtime.step_record import StepRecord
from .contest import EVEN, even_steps
from .gram import LinearisedFinish, Start
from .lockstep import Lockstep, sampler_table
from .suite import LONGEST_LAG, RecordedSample, Suite, load_suite
from .trace import Trace, TraceRecorder

__all__ = [
    "SampleRecorder",
    "SuiteRecorder",
    "cached_settings",
    "record_suite",
    "suite_beside",
    "suite_of",
]

Array = NDArray[np.float32]

ELEMENTS = 96
"""Elements of the model output that the sampler is replayed on."""

SPARSE = 6
"""Of latents and outputs every sixth row and column is kept for policies to look at."""

DROPPED = ("modulated_input",)
"""Signals that are not kept: as large as all others, and no policy's first."""


class SuiteRecorder:
    """A recorder of one uncached run after another, for a suite."""

    wants_signals = True
    across_experts: ClassVar[bool] = False

    def __init__(self, model: Model) -> None:
        """Prepare for runs of a model."""
        self._model, self._finish = model, LinearisedFinish(model, share=1.0)
        self._past: dict[str, list[Tensor]] = {}
        self._moves: dict[str, list[NDArray[np.float32]]] = {}
        self._elements: Tensor | None = None

    def on_run(self, tables: Mapping[str, Tensor], schedule: Schedule) -> None:
        """Start a run."""
        self._trace = TraceRecorder(wants_signals=True, tokens_per_frame=1)
        self._trace.on_run(tables, schedule)
        self._past.clear()
        self._moves.clear()
        self._finish.forget()
        self._prompts: dict[str, dict[str, Tensor]] = {}

    def on_step(self, record: StepRecord, dims: Mapping[str, int]) -> None:
        """Take one step of one branch."""
        assert record.computed, "only uncached runs tell every residual"
        if record.step_index == 0:
            self._note_start(record)
        self._trace.on_step(record, dims)
        past = self._past.setdefault(record.branch, [])
        vectors = self._finish.vectors(record, past, dims)
        if self._elements is None:
            drawn = torch.randperm(vectors.shape[1], generator=torch.Generator().manual_seed(0))
            self._elements = drawn[:ELEMENTS].sort().values
        own = vectors[:, self._elements.to(vectors.device)].cpu().numpy()
        padded = np.zeros((LONGEST_LAG + 1, own.shape[1]), np.float32)
        padded[: len(own)] = own
        self._moves.setdefault(record.branch, []).append(padded)
        past.insert(0, record.residual.clone())
        del past[LONGEST_LAG:]

    def _note_start(self, record: StepRecord) -> None:
        inputs = self._model.manifest.inputs
        self._latents = record.buffers["latents"].clone()
        self._prompts[record.branch] = {
            n: record.buffers[n].clone() for n, i in inputs.items() if i.runs == "prompt"
        }

    @property
    def start(self) -> Start:
        """What the last run began with."""
        return Start(self._latents, self._prompts)

    def pick(self, tensor: Tensor) -> NDArray[np.float32]:
        """Return the kept elements of an output or a sample."""
        assert self._elements is not None, "a step was taken"
        flat = tensor.float().flatten()
        return flat[self._elements.to(flat.device)].cpu().numpy()

    def recorded(self) -> tuple[Trace, dict[str, NDArray[np.float32]]]:
        """Return the trace and the moves of the run that has ended; see `RecordedSample`."""
        arrays = dict(self._trace.trace().arrays)
        for name in list(arrays):
            signal = name.rpartition("/")[2]
            if signal in DROPPED:
                del arrays[name]
            elif signal in ("latents", "filtered_latents", "model_output"):
                arrays[name] = arrays[name][:, :, ::SPARSE, ::SPARSE]
        return Trace(arrays), {branch: np.stack(own) for branch, own in self._moves.items()}


class SampleRecorder:
    """A recorder of a cached run's samples alone.

    Attributes:
        samples: What the model was given at each step.
    """

    wants_signals = False
    across_experts: ClassVar[bool] = False

    def on_run(self, tables: Mapping[str, Tensor], schedule: Schedule) -> None:
        """Start a run."""
        self.samples: list[Tensor] = []

    def on_step(self, record: StepRecord, dims: Mapping[str, int]) -> None:
        """Take one step of one branch."""
        if record.step_index == len(self.samples):
            self.samples.append(record.buffers["latents"].clone())


def cached_settings(steps: int) -> list[CacheSetting]:
    """Return the settings whose runs tell how the model answers drift.

    They compute half and a third of the steps evenly, or the early or the late ones; and hold, or
    extrapolate.
    """
    half, third = even_steps(steps // 2, steps), even_steps(max(steps // 3, 2), steps)
    early = sorted({round((steps - 1) * (i / third[-1]) ** 1.6) for i in third})
    late = sorted({0, *(steps - 1 - s for s in early)})
    forecasts = [_computing("taylorseer", exact, order=1) for exact in (half, third, early)]
    holds = [
        SolvedConfig.model_validate(
            {
                "infer_steps": steps,
                "schedules": [{"computed": exact, "mix": [[1.0]] * (steps - len(exact))}],
            }
        ).setting()
        for exact in (half, third, early, late)
    ]
    return [*forecasts, *holds, _computing("spectrum", third)]


def _computing(policy: str, exact: list[int], **parameters: float) -> CacheSetting:
    """Return a forecast that computes some steps and no other."""
    return CacheSetting(
        policy=policy,
        parameters=EVEN[policy] | parameters,
        guard=GuardSetting(exact_steps=exact),
    )


def record_suite(
    bundle: Bundle,
    prompts: Sequence[str],
    *,
    steps: int,
    first_seed: int,
    progress: Progress,
    backend: str | None = None,
    options: DeviceOptions | None = None,
) -> Suite:
    """Record a suite.

    Args:
        bundle: An open bundle of one transformer, with a sampler table of so many steps.
        prompts: One run each, with the next seed each.
        steps: Denoise steps.
        first_seed: Of the first prompt's noise.
        progress: Shown each run.
        backend: Name of a backend; None takes the bundle's first.
        options: How engines are driven; None takes the defaults.

    Raises:
        ConfigError, RequestError, BackendUnavailable: as for a run.
        RequestError: no prompt, steps outside [4, 200], or no sampler table of so many.
    """
    if not prompts or not 4 <= steps <= MAXIMUM_STEPS:
        raise RequestError(
            f"--suite of {len(prompts)} prompts and {steps} steps",
            "tells nothing",
            f"give a prompt or more, and 4 to {MAXIMUM_STEPS} steps",
        )
    generator = Generator(bundle, backend=backend, options=options)
    model = generator.transformer.session.model
    base = choose_setting(bundle, None, {}, lambda text: None)
    recorder, sampled = SuiteRecorder(model), SampleRecorder()
    progress.phase("record", len(prompts))
    runs: list[RecordedSample] = []
    for index, prompt in enumerate(prompts):
        request = GenerationRequest(
            prompt=prompt,
            cache=CacheSetting(),
            defaults=base.generation,
            steps=steps,
            seed=first_seed + index,
        )
        final = generator.generate(request, recorder=recorder).latents
        assert final is not None, "of a pipeline that a bundle records"
        trace, moves = recorder.recorded()
        table = sampler_table(bundle, trace.arrays["timesteps"])
        if table is None:
            raise RequestError(
                f"bundle '{bundle.folder}'",
                f"has no sampler table of {steps} steps, by which a suite is replayed",
                "take steps that 'freewheel inspect' lists",
            )
        cached = []
        for setting in cached_settings(steps):
            generator.generate(replace(request, cache=setting), recorder=sampled)
            cached.append(sampled.samples)
        scale = float(generator.values(request)["guidance_scale"])
        factors = (scale, 1.0 - scale) if len(moves) == 2 else (1.0,)
        guidance = dict(zip(moves, factors, strict=True))
        lockstep = Lockstep(model, [recorder.start], table, guidance, history=1)
        drifts, answers = _answers(lockstep, cached, recorder.pick)
        size = float(final.float().square().mean())
        runs.append(RecordedSample(trace, moves, drifts, answers, size))
        progress.advance(prompt)
    about = {
        "checkpoint": bundle.manifest.checkpoint.source,
        "prompts": list(prompts),
        "first_seed": first_seed,
        "guidance_scale": scale,
    }
    assert table is not None, "of the last run"
    return Suite(about, runs, table, guidance)


def _answers(
    lockstep: Lockstep, cached: Sequence[Sequence[Tensor]], pick: Callable[[Tensor], Array]
) -> tuple[Array, dict[str, Array]]:
    """Return how far cached runs of one prompt drift, and how the model answers; see `RecordedSample`."""
    branches = list(lockstep.start.residuals)
    channels = lockstep.uncached[0].shape[1]
    drifts: list[list[Array]] = []
    answers: dict[str, list[list[list[Array]]]] = {branch: [] for branch in branches}
    for step in range(lockstep.steps):
        sample = lockstep.uncached[step]
        is_packed = sample.ndim == 3
        moved = [run[step] if is_packed else run[step][:, :channels] for run in cached]
        drifts.append([pick(other - sample) for other in moved])
        for branch, own in answers.items():
            found = lockstep.answers(branch, step, sample, moved)
            own.append([[pick(whole), pick(ends)] for whole, ends in found])
    return np.array(drifts), {branch: np.array(own) for branch, own in answers.items()}


def suite_beside(bundle: Bundle, steps: int, prompts: int) -> Path:
    """Return where a bundle's suite is kept, in the folder that may be deleted."""
    digest = bundle.manifest.checkpoint.sha256[:12]
    return cache_beside(bundle.folder) / "suites" / f"{digest}-{prompts}x{steps}.npz"


def suite_of(
    bundle: Bundle,
    prompts: Sequence[str],
    *,
    steps: int,
    first_seed: int,
    progress: Progress,
    backend: str | None = None,
    options: DeviceOptions | None = None,
) -> Suite:
    """Return a bundle's suite, recorded as `record_suite` does unless it was before.

    Raises:
        RequestError: as of `record_suite`, or the file that is there is damaged.
    """
    path = suite_beside(bundle, steps, len(prompts))
    if path.exists():
        suite = load_suite(path)
        if suite.about["prompts"] == list(prompts) and suite.about["first_seed"] == first_seed:
            return suite
    suite = record_suite(
        bundle,
        prompts,
        steps=steps,
        first_seed=first_seed,
        progress=progress,
        backend=backend,
        options=options,
    )
    suite.save(path)
    return suite
