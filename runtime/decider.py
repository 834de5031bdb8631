# SPDX-License-Identifier: Apache-2.0
"""Run a compiled policy for one branch: feed it where the run stands, read its decision back."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor

from ..bundle.manifest import PolicyEntry
from ..core.errors import BundleError
from ..engines.base import BoundCall
from ..policies.deadline import Pace
from ..policies.decision_loop import DecisionRecord
from ..policies.guard import decide_inputs
from ..policies.schedule import Schedule
from ..policies.setting import GUARD_PARAMETERS, GuardSetting
from ..policies.spec import GUARD_STATE, Value
from .model import Model

__all__ = ["Decider"]


class Decider:
    """The compiled policy of one branch, with its state in small device tensors.

    Signals and features are bound by address. Where they rotate between two buffers, one call is
    bound per arrangement ahead of the run, and `decide` is told which to use.
    """

    def __init__(
        self,
        model: Model,
        policy: PolicyEntry,
        parameters: Mapping[str, Value],
        guard: GuardSetting,
        arrangements: Mapping[Hashable, Mapping[str, Tensor]],
        graph: str,
    ) -> None:
        """Allocate the state and bind the policy's graph.

        Args:
            model: Engines.
            policy: Which policy.
            parameters: Every parameter, resolved.
            guard: Limits.
            arrangements: For each way the rotating buffers can stand: ``signal``, ``feature`` and
                those of the past, as far as the policy declares them.
            graph: What decides: the policy's own, or one with the same inputs and outputs.

        Raises:
            BundleError: the graph takes an input that is not known.
        """
        self._spec, self._guard = policy.spec, guard
        declared = model.manifest.graphs[policy.graph]
        unknown = sorted(set(declared.inputs) - set(decide_inputs(policy.spec)))
        if unknown:
            raise BundleError(
                f"graph '{policy.graph}', input '{unknown[0]}'",
                "is nothing that a session gives",
                "update Freewheel, or build the bundle again",
            )
        device = model.device
        self._values = {
            n: torch.zeros(
                [s for s in e.shape if isinstance(s, int)],
                dtype=getattr(torch, e.dtype),
                device=device,
            )
            for n, e in (*declared.inputs.items(), *declared.outputs.items())
            if n not in next(iter(arrangements.values()))
        }
        for name, spec in self._spec.parameters.items():
            self._set(f"param.{name}", spec.tensor_values(name, parameters[name]))
        for name in GUARD_PARAMETERS:
            self._set(f"guard.{name}", getattr(guard, name))
        self._initial = {f"state.{n}": s.initial for n, s in self._spec.state.items()} | {
            f"guard_state.{n}": s.initial for n, s in GUARD_STATE.items()
        }
        self._calls: dict[Hashable, BoundCall] = {
            key: model.bind(graph, {**self._values, **arrangement})
            for key, arrangement in arrangements.items()
        }
        self.reset(Schedule.even(1))

    def reset(self, schedule: Schedule) -> None:
        """Start a run of these steps: every state tensor gets its initial value."""
        self._schedule = schedule
        for name, initial in self._initial.items():
            self._set(name, initial)
        self._set("step_count", len(schedule))

    def decide(
        self,
        step_index: int,
        computed_steps: Sequence[int],
        arrangement: Hashable,
        pace: Pace,
    ) -> DecisionRecord:
        """Decide about the coming step.

        Args:
            step_index: 0-based.
            computed_steps: Indices of the residuals held, newest first.
            arrangement: How the buffers stand now.
            pace: Against the run's deadline.
        """
        values = self._values
        self._set("step_index", step_index)
        self._set("exact", step_index in self._guard.exact_steps)
        timesteps, sigmas = self._schedule.timesteps, self._schedule.sigmas
        self._set("timestep", timesteps[step_index])
        self._set("sigma", sigmas[step_index])
        self._set_padded("computed_steps", computed_steps, -1)
        self._set_padded("computed_timesteps", [timesteps[s] for s in computed_steps], 0.0)
        self._set_padded("computed_sigmas", [sigmas[s] for s in computed_steps], 0.0)
        for name, seconds in pace._asdict().items():
            self._set(name, seconds)
        self._calls[arrangement].run()
        compute = bool(values["compute"].item())
        mix = [] if compute else values["mix"].tolist()
        for name in self._initial:
            if f"new_{name}" in values and name in values:
                values[name].copy_(values[f"new_{name}"])
        distance = self._spec.distance
        return DecisionRecord(
            compute, mix, None if distance is None else float(values[f"new_state.{distance}"])
        )

    def _set_padded(self, name: str, values: Sequence[float], rest: float) -> None:
        if (tensor := self._values.get(name)) is not None:
            size = len(tensor)
            self._set(name, [*values, *[rest] * size][:size])

    def _set(self, name: str, value: float | bool | Sequence[float]) -> None:
        """Write an input of the graph; inputs that the graph does not use are not there."""
        tensor = self._values.get(name)
        if tensor is None:
            return
        if isinstance(value, Sequence):
            tensor.copy_(torch.tensor(value, dtype=tensor.dtype))
        else:
            tensor.fill_(value)
