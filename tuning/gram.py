# SPDX-License-Identifier: Apache-2.0
"""Inner products of residuals, accumulated while uncached runs go by.

Every least-squares mix of past residuals, and the error of every mix, needs inner products only.
They are taken where errors matter: through ``finish``, linearised at the step's true residual.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load, save
from torch import Tensor

from ..engines.base import BoundCall
from ..policies.base import relative_change
from ..policies.schedule import Schedule
from ..runtime.buffers import allocate
from ..runtime.model import Model
from ..runtime.step_record import StepRecord

__all__ = ["PERTURBATION", "GramRecorder", "Grams", "LinearisedFinish", "RecordedRun", "Start"]

Array = NDArray[np.float64]

PERTURBATION = 0.1
"""Share of a difference of residuals that ``finish`` is shown to be linearised."""


@dataclass(frozen=True)
class Grams:
    """Sums over runs of inner products, per step.

    With L the linear map of step t from a residual's change to the model output's, branch b has the
    vectors L(r_t), L(r_{t−1} − r_t), …, L(r_{t−window} − r_t); all branches' vectors stand one
    after the other. Differences of steps before the first are zero.

    Attributes:
        branches: Branch names, in order.
        window: Steps back.
        values: float64 [steps, branches · (window + 1), branches · (window + 1)], mean squares of
            the model output's elements, summed over runs.
        runs: Runs summed.
    """

    branches: tuple[str, ...]
    window: int
    values: Array
    runs: int

    @property
    def steps(self) -> int:
        """Steps of the runs."""
        return len(self.values)


@dataclass(frozen=True)
class Start:
    """What a run began with.

    Attributes:
        latents: The first step's input, [1, channels, …]; beyond the model output's channels it holds
            the condition, which stays.
        prompts: Per branch, the prompt's inputs by name.
    """

    latents: Tensor
    prompts: Mapping[str, Mapping[str, Tensor]]


@dataclass
class RecordedRun:
    """What one uncached run leaves.

    Attributes:
        tables: Per-run tables [steps, …], as arrays.
        latents: The first step's input; see `Start`.
        prompts: Per branch, the prompt's inputs by name; see `Start`.
        changes: Per branch, mean|r_t − r_{t−1}| / mean|r_{t−1}|, [steps − 1].
        ratios: Per branch, the mean over tokens of ‖r_t‖₂ / ‖r_{t−1}‖₂, [steps − 1].
        grams: As `Grams.values`, of this run.
    """

    tables: dict[str, NDArray[np.float32]]
    latents: Tensor = field(default_factory=lambda: torch.zeros(0))
    prompts: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    changes: dict[str, list[float]] = field(default_factory=dict)
    ratios: dict[str, list[float]] = field(default_factory=dict)
    grams: Array = field(default_factory=lambda: np.zeros(0))

    def to_bytes(self) -> bytes:
        """Return the run as a safetensors file."""
        about = json.dumps([self.changes, self.ratios]).encode()
        tensors = {
            "about": torch.frombuffer(bytearray(about), dtype=torch.uint8),
            "latents": self.latents,
            "grams": torch.from_numpy(self.grams),
            **{f"tables/{n}": torch.from_numpy(t) for n, t in self.tables.items()},
        }
        for branch, inputs in self.prompts.items():
            tensors |= {f"prompts/{branch}/{n}": t for n, t in inputs.items()}
        return save({n: t.cpu().contiguous() for n, t in tensors.items()})

    @classmethod
    def from_bytes(cls, content: bytes, device: torch.device) -> RecordedRun:
        """Read what `to_bytes` wrote; latents and prompts go to a device."""
        tensors = load(content)
        changes, ratios = json.loads(bytes(tensors["about"].tolist()))
        prompts: dict[str, dict[str, Tensor]] = {branch: {} for branch in changes}
        tables = {}
        for path, tensor in tensors.items():
            kind, _, name = path.partition("/")
            if kind == "tables":
                tables[name] = tensor.numpy()
            elif kind == "prompts":
                branch, _, name = name.partition("/")
                prompts[branch][name] = tensor.to(device)
        grams, latents = tensors["grams"].numpy(), tensors["latents"].to(device)
        return cls(tables, latents, prompts, changes, ratios, grams)


class LinearisedFinish:
    """What changes of a step's residual do to its model output, to first order."""

    def __init__(self, model: Model, share: float = PERTURBATION) -> None:
        """Prepare for steps of a model: its ``finish`` is called beside the loop.

        Args:
            model: Engines.
            share: Share of a difference of residuals that ``finish`` is shown; 1 is exact for each
                difference alone.
        """
        self._model, self._share = model, share
        self._calls: dict[str, tuple[BoundCall, Tensor, Tensor]] = {}

    def forget(self) -> None:
        """Forget the buffers of a run that has ended."""
        self._calls.clear()

    def vectors(
        self, record: StepRecord, past: Sequence[Tensor], dims: Mapping[str, int]
    ) -> Tensor:
        """Return L(r_t), and L(r − r_t) of other residuals, float32 [1 + others, output elements].

        Args:
            record: A computed step; L is linearised at its residual r_t.
            past: Other residuals r.
            dims: Sizes of the run.
        """
        hidden = record.buffers["hidden"]
        actual = hidden + record.residual
        changed = [hidden + record.residual * (1 - PERTURBATION)]
        changed += [actual + self._share * (r - record.residual) for r in past]
        outputs = torch.stack([self._run(h, record, dims) for h in (actual, *changed)])
        vectors = outputs[1:] - outputs[:1]
        vectors[0] /= -PERTURBATION
        vectors[1:] /= self._share
        return vectors

    def _run(self, hidden_out: Tensor, record: StepRecord, dims: Mapping[str, int]) -> Tensor:
        """Return the model output of hidden states at the current step, flat."""
        if record.branch not in self._calls:
            outputs = allocate(
                self._model.manifest.graphs["finish"].outputs, dims, self._model.device
            )
            values = {**record.buffers, "hidden_out": torch.zeros_like(hidden_out), **outputs}
            call = self._model.bind("finish", values)
            self._calls[record.branch] = (call, values["hidden_out"], next(iter(outputs.values())))
        call, placed, output = self._calls[record.branch]
        placed.copy_(hidden_out)
        call.run()
        self._model.backend.synchronize()
        return output.float().flatten().clone()


class GramRecorder:
    """A recorder that takes inner products, and the residuals' changes, of any number of runs.

    Holds the last ``window`` residuals of each branch, and nothing else hidden-sized.

    Attributes:
        wants_signals: Never.
        runs: What each run left.
    """

    wants_signals = False
    across_experts: ClassVar[bool] = False

    def __init__(self, model: Model, *, window: int = 16) -> None:
        """Prepare for runs of a model.

        Args:
            model: Its ``finish`` is called beside the loop.
            window: Steps back that a mix may reach.
        """
        self.runs: list[RecordedRun] = []
        self._model, self._window = model, window
        self._finish = LinearisedFinish(model)
        self._past: dict[str, deque[Tensor]] = {}
        self._vectors: dict[int, dict[str, Tensor]] = {}

    def on_run(self, tables: Mapping[str, Tensor], schedule: Schedule) -> None:
        """Start a run: forget the last one's residuals."""
        if self.runs:
            self.end_run()
        self._past.clear()
        self._finish.forget()
        arrays = {n: t.float().cpu().numpy().copy() for n, t in tables.items()}
        arrays["timesteps"] = np.array(schedule.timesteps, np.float32)
        arrays["sigmas"] = np.array(schedule.sigmas, np.float32)
        self.runs.append(RecordedRun(arrays))

    def on_step(self, record: StepRecord, dims: Mapping[str, int]) -> None:
        """Take one step of one branch."""
        assert record.computed, "only uncached runs tell every residual"
        run = self.runs[-1]
        if record.step_index == 0:
            self._note_start(run, record)
        past = self._past.setdefault(record.branch, deque(maxlen=self._window))
        if past:
            before = past[0]
            change = relative_change(record.residual, before)
            ratio = (record.residual.norm(dim=-1) / before.norm(dim=-1)).mean()
            run.changes[record.branch].append(float(change))
            run.ratios[record.branch].append(float(ratio))
        vectors = self._finish.vectors(record, list(past), dims)
        missing = self._window + 1 - len(vectors)
        vectors = torch.cat([vectors, vectors.new_zeros(missing, vectors.shape[1])])
        self._vectors.setdefault(record.step_index, {})[record.branch] = vectors
        past.appendleft(record.residual.clone())

    def _note_start(self, run: RecordedRun, record: StepRecord) -> None:
        inputs = self._model.manifest.inputs
        run.latents = record.buffers["latents"].clone()
        run.prompts[record.branch] = {
            n: record.buffers[n].clone() for n, i in inputs.items() if i.runs == "prompt"
        }
        run.changes[record.branch], run.ratios[record.branch] = [], []

    def end_run(self) -> RecordedRun:
        """Take the inner products of the run that has ended, and return all of it."""
        run = self.runs[-1]
        grams = []
        for step in sorted(self._vectors):
            vectors = torch.cat([self._vectors[step][name] for name in run.changes]).double()
            grams.append((vectors @ vectors.T).cpu().numpy() / vectors.shape[1])
        if grams:
            run.grams = np.stack(grams)
        self._vectors.clear()
        return run

    @property
    def tables(self) -> dict[str, NDArray[np.float32]]:
        """The last run's per-run tables."""
        return self.runs[-1].tables

    @property
    def changes(self) -> dict[str, list[list[float]]]:
        """Per branch, the changes of each run, [runs][steps − 1]; see `RecordedRun`."""
        return {n: [run.changes[n] for run in self.runs] for n in self.runs[0].changes}

    @property
    def ratios(self) -> dict[str, list[list[float]]]:
        """Per branch, the ratios of each run, [runs][steps − 1]; see `RecordedRun`."""
        return {n: [run.ratios[n] for run in self.runs] for n in self.runs[0].ratios}

    @property
    def starts(self) -> list[Start]:
        """What each run began with."""
        return [Start(run.latents, run.prompts) for run in self.runs]

    def grams(self) -> Grams:
        """Return the sums over all runs, added in their order; none may be under way."""
        self.end_run()
        values = np.zeros_like(self.runs[0].grams)
        for run in self.runs:
            values = values + run.grams
        return Grams(tuple(self.changes), self._window, values, len(self.runs))
