# SPDX-License-Identifier: Apache-2.0
"""Inner products of residuals, accumulated while uncached runs go by.

Every least-squares mix of past residuals, and the error of every mix, needs inner products only.
They are taken where errors matter: through ``finish``, linearised at the step's true residual.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..engines.base import BoundCall
from ..policies.base import relative_change
from ..policies.schedule import Schedule
from ..runtime.body import allocate
from ..runtime.model import LoadedModel
from ..runtime.session import StepRecord

__all__ = ["PERTURBATION", "GramRecorder", "Grams", "Start"]

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


class GramRecorder:
    """A recorder that sums up `Grams`, and the residuals' changes, over any number of runs.

    Holds the last ``window`` residuals of each branch, and nothing else of a run.

    Attributes:
        wants_signals: Never.
        tables: The last run's per-run tables [steps, …], as arrays.
        changes: Per branch, mean|r_t − r_{t−1}| / mean|r_{t−1}| of each run, [runs][steps − 1].
        ratios: Per branch, the mean over tokens of ‖r_t‖₂ / ‖r_{t−1}‖₂ of each run.
        starts: What each run began with.
    """

    wants_signals = False
    across_experts: ClassVar[bool] = False

    def __init__(self, model: LoadedModel, *, window: int = 16) -> None:
        """Prepare for runs of a model.

        Args:
            model: Its ``finish`` is called beside the loop.
            window: Steps back that a mix may reach.
        """
        self.tables: dict[str, NDArray[np.float32]] = {}
        self.changes: dict[str, list[list[float]]] = {}
        self.ratios: dict[str, list[list[float]]] = {}
        self.starts: list[Start] = []
        self._model, self._window = model, window
        self._calls: dict[str, tuple[BoundCall, Tensor, Tensor]] = {}
        self._past: dict[str, deque[Tensor]] = {}
        self._vectors: dict[int, dict[str, Tensor]] = {}
        self._sums: dict[int, Array] = {}
        self._runs = 0

    def on_run(self, tables: Mapping[str, Tensor], schedule: Schedule) -> None:
        """Start a run: forget the last one's residuals."""
        self._add_up()
        self._past.clear()
        self._calls.clear()
        self._runs += 1
        self.tables = {n: t.float().cpu().numpy().copy() for n, t in tables.items()}
        self.tables["timesteps"] = np.array(schedule.timesteps, np.float32)
        self.tables["sigmas"] = np.array(schedule.sigmas, np.float32)

    def on_step(self, record: StepRecord, dims: Mapping[str, int]) -> None:
        """Take one step of one branch."""
        assert record.computed, "only uncached runs tell every residual"
        if record.step_index == 0:
            self._note_start(record)
        past = self._past.setdefault(record.branch, deque(maxlen=self._window))
        if not past:
            self.changes.setdefault(record.branch, []).append([])
            self.ratios.setdefault(record.branch, []).append([])
        else:
            before = past[0]
            change = relative_change(record.residual, before)
            ratio = (record.residual.norm(dim=-1) / before.norm(dim=-1)).mean()
            self.changes[record.branch][-1].append(float(change))
            self.ratios[record.branch][-1].append(float(ratio))
        vectors = self._linearised(record, list(past), dims)
        self._vectors.setdefault(record.step_index, {})[record.branch] = vectors
        past.appendleft(record.residual.clone())

    def _note_start(self, record: StepRecord) -> None:
        inputs = self._model.manifest.inputs
        prompt = {n: record.buffers[n].clone() for n, i in inputs.items() if i.runs == "prompt"}
        known = self.starts[-1].prompts if len(self.starts) == self._runs else {}
        start = Start(record.buffers["latents"].clone(), {**known, record.branch: prompt})
        self.starts[self._runs - 1 :] = [start]

    def grams(self) -> Grams:
        """Return the sums over all runs; none may be under way."""
        self._add_up()
        values = np.stack([self._sums[t] for t in sorted(self._sums)])
        return Grams(tuple(self.changes), self._window, values, self._runs)

    def _add_up(self) -> None:
        for step_index, by_branch in self._vectors.items():
            vectors = torch.cat([by_branch[name] for name in self.changes])
            gram = (vectors.double() @ vectors.double().T).cpu().numpy() / vectors.shape[1]
            self._sums[step_index] = self._sums.get(step_index, 0.0) + gram
        self._vectors.clear()

    def _linearised(
        self, record: StepRecord, past: list[Tensor], dims: Mapping[str, int]
    ) -> Tensor:
        """Return the vectors of one branch at one step, float32 [window + 1, output elements]."""
        hidden = record.buffers["hidden"]
        actual = hidden + record.residual
        changed = [hidden + record.residual * (1 - PERTURBATION)]
        changed += [actual + PERTURBATION * (r - record.residual) for r in past]
        outputs = torch.stack([self._finish(h, record, dims) for h in (actual, *changed)])
        vectors = (outputs[1:] - outputs[:1]) / PERTURBATION
        vectors[0] *= -1
        missing = self._window + 1 - len(vectors)
        return torch.cat([vectors, vectors.new_zeros(missing, vectors.shape[1])])

    def _finish(self, hidden_out: Tensor, record: StepRecord, dims: Mapping[str, int]) -> Tensor:
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
