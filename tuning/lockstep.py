# SPDX-License-Identifier: Apache-2.0
"""Fit the mixes of a solved schedule again, on the runs that it itself makes.

What `solve` fits, it fits to residuals of uncached runs. A cached run leaves that trajectory: its past
residuals are others, and errors of earlier steps have moved the sample. Here several prompts run
step by step together; each reused step's mix is fitted to where the run then stands, to the model
output that would bring the next sample back to the uncached one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file
from torch import Tensor

from ..bundle.reader import Bundle
from ..configs.setting import CacheSetting
from ..runtime.model import LoadedModel
from ..runtime.session import OpenStep, Session
from .gram import Start
from .solve import Solution

__all__ = ["SamplerRows", "refine", "sampler_rows"]

Array = NDArray[np.float64]

PERTURBATION = 0.1
"""Share of a difference of residuals that ``finish`` is shown to be linearised."""

RIDGE = 1e-4
"""Pull towards holding the newest residual, relative to each direction's own square."""


@dataclass(frozen=True)
class SamplerRows:
    """A sampler as rows of factors: ``x[t+1] = Σ a[t][k]·x[t−k] + Σ b[t][k]·v[t−k]``.

    Attributes:
        timesteps: [steps].
        a: Factors of samples, newest first, [steps, window].
        b: Factors of model outputs, likewise.
    """

    timesteps: Array
    a: Array
    b: Array

    def advance(self, step: int, samples: Sequence[Tensor], outputs: Sequence[Tensor]) -> Tensor:
        """Return the next sample from all samples and outputs so far, oldest first."""
        reach = range(min(self.a.shape[1], step + 1))
        total = torch.zeros_like(samples[step], dtype=torch.float64)
        for k in reach:
            total += float(self.a[step, k]) * samples[step - k].double()
            total += float(self.b[step, k]) * outputs[step - k].double()
        return total.float()


def sampler_rows(bundle: Bundle, timesteps: NDArray[np.floating]) -> SamplerRows | None:
    """Return the bundle's sampler that runs through these timesteps, or None where it has none."""
    for entry in bundle.manifest.samplers:
        if len(timesteps) not in entry.steps:
            continue
        table = load_file(bundle.path(entry.file))[str(len(timesteps))]
        if np.allclose(table[:, 0], timesteps, rtol=1e-6):
            return SamplerRows(
                table[:, 0], table[:, 2 : 2 + entry.window], table[:, 2 + entry.window :]
            )
    return None


def refine(
    model: LoadedModel,
    starts: Sequence[Start],
    rows: SamplerRows,
    guidance: Mapping[str, float],
    solutions: Mapping[int, Solution],
    *,
    history: int,
) -> dict[int, Solution]:
    """Fit every solution's mixes again.

    Args:
        model: Engines.
        starts: Runs of equal size, one batch in all.
        rows: The sampler.
        guidance: Factor of each branch's output in the guided one.
        solutions: Schedules by number of computed steps.
        history: Residuals that a mix uses at most.

    Returns:
        The same schedules with other mixes.
    """
    loop = _Loop(model, starts, rows, guidance)
    return {
        count: replace(solution, mix=loop.fit(frozenset(solution.computed), history))
        for count, solution in solutions.items()
    }


class _Loop:
    """All runs in lockstep, uncached once and then cached as often as there are schedules."""

    def __init__(
        self,
        model: LoadedModel,
        starts: Sequence[Start],
        rows: SamplerRows,
        guidance: Mapping[str, float],
    ) -> None:
        self._session, self._rows, self._guidance = Session(model), rows, guidance
        self._session.begin(torch.tensor(rows.timesteps, dtype=torch.float32), CacheSetting())
        for branch in guidance:
            inputs = {
                n: torch.cat([s.prompts[branch][n] for s in starts])
                if model.manifest.inputs[n].shape[0] == "batch"
                else tensor
                for n, tensor in starts[0].prompts[branch].items()
            }
            self._session.set_prompt(branch, inputs)
        latents = torch.cat([s.latents for s in starts])
        channels = model.manifest.graphs["finish"].outputs["model_output"].shape[1]
        assert isinstance(channels, int), "the output's channels are the checkpoint's"
        is_packed = latents.ndim == 3
        self._noise = latents if is_packed else latents[:, :channels]
        self._condition = latents[:, :0] if is_packed else latents[:, channels:]
        self._samples, self._outputs = self._run_uncached()

    def _run_uncached(self) -> tuple[list[Tensor], list[Tensor]]:
        samples, outputs = [self._noise], list[Tensor]()
        for step in range(len(self._rows.timesteps)):
            output = torch.zeros_like(self._noise)
            for branch, factor in self._guidance.items():
                opened = self._open(branch, step, samples[-1])
                output += factor * opened.finish(opened.compute())
            outputs.append(output)
            samples.append(self._rows.advance(step, samples, outputs))
        return samples, outputs

    def _open(self, branch: str, step: int, sample: Tensor) -> OpenStep:
        latents = torch.cat([sample, self._condition], dim=1)
        return self._session.open_step(branch, step, {"latents": latents})

    def fit(self, computed: frozenset[int], history: int) -> dict[str, list[list[float]]]:
        """Run with a schedule, fitting the mix of each reused step on the way."""
        past: dict[str, list[Tensor]] = {branch: [] for branch in self._guidance}
        mixes: dict[str, list[list[float]]] = {branch: [] for branch in self._guidance}
        samples, outputs = [self._noise], list[Tensor]()
        for step in range(len(self._rows.timesteps)):
            if step in computed:
                for branch in self._guidance:
                    residual = self._open(branch, step, samples[-1]).compute()
                    past[branch] = [residual.clone(), *past[branch]][:history]
                    mixes[branch].append([])
                used = {branch: residuals[0] for branch, residuals in past.items()}
            else:
                target = self._target(step, samples, outputs)
                rows = self._fit_step(step, samples[-1], past, target)
                for branch, row in rows.items():
                    mixes[branch].append([round(f, 6) for f in row])
                used = {
                    branch: torch.stack(
                        [f * r for f, r in zip(row, past[branch], strict=True)]
                    ).sum(0)
                    for branch, row in rows.items()
                }
            output = torch.zeros_like(self._noise)
            for branch, factor in self._guidance.items():
                output += factor * self._open(branch, step, samples[-1]).finish(used[branch])
            outputs.append(output)
            samples.append(self._rows.advance(step, samples, outputs))
        return mixes

    def _target(self, step: int, samples: Sequence[Tensor], outputs: Sequence[Tensor]) -> Tensor:
        """Return the guided output from which the sampler would reach the uncached next sample."""
        rows = self._rows
        reach = range(min(rows.a.shape[1], step + 1))
        drift = torch.zeros_like(self._noise)
        for k in reach:
            drift += float(rows.a[step, k]) * (samples[step - k] - self._samples[step - k])
        for k in reach[1:]:
            drift += float(rows.b[step, k]) * (outputs[step - k] - self._outputs[step - k])
        return self._outputs[step] - drift / float(rows.b[step, 0])

    def _fit_step(
        self, step: int, sample: Tensor, past: Mapping[str, list[Tensor]], target: Tensor
    ) -> dict[str, list[float]]:
        """Return each branch's mix, newest first: least squares over all runs and both branches."""
        held = torch.zeros_like(target)
        directions = []
        for branch, factor in self._guidance.items():
            opened, (newest, *older) = self._open(branch, step, sample), past[branch]
            base = opened.finish(newest)
            held += factor * base
            for change in (newest, *(r - newest for r in older)):
                moved = opened.finish(newest + PERTURBATION * change)
                directions.append(factor * (moved - base) / PERTURBATION)
        columns = torch.stack([d.flatten().double() for d in directions])
        gram, aim = columns @ columns.T, columns @ (target - held).flatten().double()
        gram += RIDGE * torch.diag(torch.diag(gram))
        found = torch.linalg.lstsq(gram, aim[:, None]).solution[:, 0].tolist()
        mixes = {}
        for branch in self._guidance:
            own, found = found[: len(past[branch])], found[len(past[branch]) :]
            mixes[branch] = [1.0 + own[0] - sum(own[1:]), *own[1:]]
        return mixes
