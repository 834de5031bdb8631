# SPDX-License-Identifier: Apache-2.0
"""Cached runs of several prompts, step by step together, each beside its uncached one.

What `solve` fits, it fits to residuals of uncached runs. A cached run leaves that trajectory: its past
residuals are others, and errors of earlier steps have moved the sample. Here a schedule is really
run; each reused step's mix is fitted, over all prompts, to where their runs then stand, and to the
model output that would bring the next sample back to the uncached one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file
from torch import Tensor

from ..bundle.reader import Bundle
from ..bundle.sampler_table import SamplerTable
from ..policies.setting import CacheSetting
from ..runtime.model import Model
from ..runtime.session import Session
from ..runtime.step_record import OpenStep
from .gram import PERTURBATION, Start

__all__ = ["Lockstep", "Point", "sampler_table"]

Array = NDArray[np.float64]
Mixes = Mapping[str, tuple[list[float], ...]]

RIDGE = 1e-3
"""Pull towards holding the newest residual, relative to each direction's own square."""


def sampler_table(bundle: Bundle, timesteps: NDArray[np.floating]) -> SamplerTable | None:
    """Return the bundle's sampler that runs through these timesteps, or None where it has none."""
    for entry in bundle.manifest.samplers:
        if len(timesteps) not in entry.steps:
            continue
        table = SamplerTable.of(load_file(bundle.path(entry.file))[str(len(timesteps))])
        if np.allclose(table.timesteps, timesteps, rtol=1e-6):
            return table
    return None


@dataclass(frozen=True)
class Point:
    """Where all runs of a schedule stand between two steps; runs go along each tensor's first axis.

    Attributes:
        samples: One per step so far, and the next step's.
        outputs: Guided model outputs, one per step so far.
        residuals: Per branch, those of the last computed steps, newest first.
        mix: Per branch, one row per step so far: factors of past residuals, empty where computed.
    """

    samples: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    residuals: Mapping[str, tuple[Tensor, ...]]
    mix: Mixes


class Lockstep:
    """Several prompts, run uncached once, and then with any number of schedules.

    Every prompt has a session of its own, so no engine meets a batch that it was not built for.

    Attributes:
        steps: Steps of a run.
        start: Where every schedule begins.
        uncached: Samples of the uncached runs, as in `Point`.
        on_step: Called after each step of all runs.
    """

    def __init__(
        self,
        model: Model,
        starts: Sequence[Start],
        table: SamplerTable,
        guidance: Mapping[str, float],
        *,
        history: int,
        on_step: Callable[[], None] = lambda: None,
    ) -> None:
        """Run every prompt uncached.

        Args:
            model: Engines.
            starts: What runs begin with, all of one size.
            table: The sampler.
            guidance: Factor of each branch's output in the guided one.
            history: Residuals that a mix uses at most.
            on_step: See the class.
        """
        self.on_step = on_step
        self._table, self._guidance, self._history = table, guidance, history
        self._sessions = [self._session(model, start) for start in starts]
        self.steps = len(table.timesteps)
        latents = torch.cat([s.latents for s in starts])
        channels = model.manifest.graphs["finish"].outputs["model_output"].shape[1]
        assert isinstance(channels, int), "the output's channels are the checkpoint's"
        is_packed = latents.ndim == 3
        noise = latents if is_packed else latents[:, :channels]
        self._condition = latents[:, :0] if is_packed else latents[:, channels:]
        nothing: dict[str, tuple[()]] = dict.fromkeys(guidance, ())
        self.start = Point((noise,), (), nothing, nothing)
        point = self.start
        for _ in range(self.steps):
            point = self.advance(point, compute=True)
        self.uncached, self._uncached_outputs = point.samples, point.outputs

    def _session(self, model: Model, start: Start) -> Session:
        session = Session(model)
        session.begin(torch.tensor(self._table.timesteps, dtype=torch.float32), CacheSetting())
        for branch in self._guidance:
            session.set_prompt(branch, dict(start.prompts[branch]))
        return session

    def run(self, computed: Collection[int], after: Sequence[Point] = ()) -> Iterator[Point]:
        """Run a schedule, and yield the point behind each step.

        Args:
            computed: Steps to compute.
            after: Points of a schedule that is the same so far, the start first; the run goes on
                from the last.
        """
        point = after[-1] if after else self.start
        for step in range(len(point.outputs), self.steps):
            point = self.advance(point, compute=step in computed)
            yield point

    def advance(self, point: Point, *, compute: bool) -> Point:
        """Take one step, fitting its mix where it is reused."""
        step, sample = len(point.outputs), point.samples[-1]
        residuals = dict(point.residuals)
        rows: Mapping[str, list[float]] = {branch: [] for branch in self._guidance}
        if compute:
            for branch in self._guidance:
                fresh = [opened.compute() for opened in self._opened(branch, step, sample)]
                residuals[branch] = (torch.cat(fresh), *residuals[branch])[: self._history]
            used = {branch: past[0] for branch, past in residuals.items()}
        else:
            rows = self._fit(point)
            used = {branch: _mixed(row, residuals[branch]) for branch, row in rows.items()}
        output = torch.zeros_like(sample)
        for branch, factor in self._guidance.items():
            output += factor * self._finish(branch, step, sample, [used[branch]])[0]
        outputs = (*point.outputs, output)
        following = self._table.advance(step, point.samples, outputs)
        mix = {branch: (*point.mix[branch], row) for branch, row in rows.items()}
        self.on_step()
        return Point((*point.samples, following), outputs, residuals, mix)

    def distances(self, point: Point) -> list[float]:
        """Return how far each run's sample is from its uncached one, in dB.

        It is 10·log₁₀ of the mean square of the difference over that of the uncached sample.
        """
        reference = self.uncached[len(point.outputs)]
        apart = (point.samples[-1] - reference).square().flatten(1).mean(1)
        size = reference.square().flatten(1).mean(1)
        tiny = torch.finfo(torch.float32).tiny
        return [float(d) for d in 10 * torch.log10(apart.clamp(min=tiny) / size)]

    def inputs(self, sample: Tensor) -> Tensor:
        """Return what the model takes as latents: the sample and the condition of every run."""
        return torch.cat([sample, self._condition], dim=1)

    def output(self, branch: str, step: int, sample: Tensor) -> Tensor:
        """Return a branch's model output of any sample at any step, every block computed."""
        opened = self._opened(branch, step, sample)
        return torch.cat([own.finish(own.compute()) for own in opened])

    def answers(
        self, branch: str, step: int, sample: Tensor, moved: Sequence[Tensor]
    ) -> list[tuple[Tensor, Tensor]]:
        """Return how a branch's output changes from a sample to each of some moved ones.

        Returns:
            The whole model's change, and that of its ends around the first sample's residual.
        """
        residuals, outputs = [], []
        for opened in self._opened(branch, step, sample):
            residuals.append(opened.compute())
            outputs.append(opened.finish(residuals[-1]))
        residual, output = torch.cat(residuals), torch.cat(outputs)
        found = []
        for other in moved:
            (kept,) = self._finish(branch, step, other, [residual])
            found.append((self.output(branch, step, other) - output, kept - output))
        return found

    def _opened(self, branch: str, step: int, sample: Tensor) -> Iterator[OpenStep]:
        """Open one step of every run in turn; each is good until the next is asked for."""
        for index, session in enumerate(self._sessions):
            own = slice(index, index + 1)
            yield session.open_step(branch, step, {"latents": self.inputs(sample)[own]})

    def _finish(
        self, branch: str, step: int, sample: Tensor, residuals: Sequence[Tensor]
    ) -> list[Tensor]:
        """Return the model output that each residual leads to."""
        found: list[list[Tensor]] = [[] for _ in residuals]
        for index, opened in enumerate(self._opened(branch, step, sample)):
            for outputs, residual in zip(found, residuals, strict=True):
                outputs.append(opened.finish(residual[index : index + 1]))
        return [torch.cat(outputs) for outputs in found]

    def _target(self, point: Point) -> Tensor:
        """Return the guided output from which the sampler would reach the uncached next sample."""
        step, table = len(point.outputs), self._table
        reach = range(min(table.window, step + 1))
        drift = torch.zeros_like(point.samples[-1])
        for k in reach:
            drift += float(table.a[step, k]) * (point.samples[step - k] - self.uncached[step - k])
        for k in reach[1:]:
            apart = point.outputs[step - k] - self._uncached_outputs[step - k]
            drift += float(table.b[step, k]) * apart
        return self._uncached_outputs[step] - drift / float(table.b[step, 0])

    def _fit(self, point: Point) -> dict[str, list[float]]:
        """Return each branch's mix, newest first: least squares over all runs and both branches."""
        step, sample = len(point.outputs), point.samples[-1]
        held = torch.zeros_like(sample)
        directions = []
        for branch, factor in self._guidance.items():
            newest, *older = point.residuals[branch]
            changes = [newest, *(r - newest for r in older)]
            moved = [newest + PERTURBATION * change for change in changes]
            base, *outputs = self._finish(branch, step, sample, [newest, *moved])
            held += factor * base
            directions += [factor * (output - base) / PERTURBATION for output in outputs]
        columns = torch.stack([d.flatten().double() for d in directions])
        aim = columns @ (self._target(point) - held).flatten().double()
        gram = columns @ columns.T
        gram += RIDGE * torch.diag(torch.diag(gram))
        found = torch.linalg.lstsq(gram, aim[:, None]).solution[:, 0].tolist()
        mixes = {}
        for branch, past in point.residuals.items():
            own, found = found[: len(past)], found[len(past) :]
            row = [1.0 + own[0] - sum(own[1:]), *own[1:]]
            mixes[branch] = [round(factor, 6) for factor in row]
        return mixes


def _mixed(row: Sequence[float], residuals: Sequence[Tensor]) -> Tensor:
    total = torch.zeros_like(residuals[0])
    for factor, residual in zip(row, residuals, strict=True):
        total += factor * residual
    return total
