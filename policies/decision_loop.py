# SPDX-License-Identifier: Apache-2.0
"""Drive a decide function step by step, as a session does, and keep what it keeps.

The function is the eager `Guarded` module ("the Python law") or a compiled graph: both take and
return tensors by the same names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import policy
from .deadline import Pace
from .guard import Guarded
from .schedule import Schedule
from .setting import GUARD_PARAMETERS, CacheSetting
from .spec import GUARD_STATE, ParameterSpec, PolicySpec, StateSpec

__all__ = [
    "Array",
    "DecideFunction",
    "DecisionLoop",
    "DecisionRecord",
    "difference_gram",
    "initial_tensors",
    "parameter_tensors",
]

Array = Tensor | np.ndarray[Any, Any]

NO_HURRY = Pace()

DecideFunction = Callable[[dict[str, Tensor]], Mapping[str, Tensor]]
"""Takes the tensors that `guard.decide_inputs` names, returns those of `guard.decide_outputs`. A
compiled graph that lacks an input its law does not use is expected to pick what it takes."""


@dataclass(frozen=True)
class DecisionRecord:
    """What was decided about one step of one branch.

    Attributes:
        compute: True where the body runs.
        mix: Factor of each past residual, newest first; read only on reused steps.
        distance: Accumulated distance after the decision, where the policy reports one.
    """

    compute: bool
    mix: list[float]
    distance: float | None


def parameter_tensors(
    specs: Mapping[str, ParameterSpec], values: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Return each declared parameter as the tensor its graph input takes.

    Args:
        specs: Declared parameters.
        values: Given values; defaults fill in the rest.

    Raises:
        ConfigError: a value is of the wrong type, length or range.
    """
    return {
        name: torch.tensor(
            spec.tensor_values(name, values.get(name, spec.default)),
            dtype=getattr(torch, spec.dtype),
        )
        for name, spec in specs.items()
    }


def initial_tensors(specs: Mapping[str, StateSpec]) -> dict[str, Tensor]:
    """Return each declared state tensor at the start of a run."""
    return {
        name: torch.full(spec.shape, spec.initial, dtype=getattr(torch, spec.dtype))
        for name, spec in specs.items()
    }


class DecisionLoop:
    """One branch of one run: decides step after step, holding nothing but that run's state.

    Before step t the decide function sees the signal of step t, those of step t − 1 and of the last
    two computed steps, the feature of the last two computed steps (zeros where there is none), and
    the indices of the residuals kept, newest first, padded by −1.

    Attributes:
        step_index: The step that the next decision is about.
        last_computed: Index of the last computed step, whose feature `decide` is to be given.
        computed_steps: Indices of the residuals kept, newest first.

    Args:
        spec: The policy's declaration.
        decide: Eager `Guarded` module or a compiled graph.
        setting: Parameters and guard; its ``policy`` must be ``spec.name``.
        step_count: Steps of the run.
        schedule: Their timesteps and noise levels; None takes evenly falling ones.

    Raises:
        ConfigError: a parameter is unknown, of the wrong type or out of range, or the signal is none
            that the policy takes.
    """

    def __init__(
        self,
        spec: PolicySpec,
        decide: DecideFunction,
        setting: CacheSetting,
        *,
        step_count: int,
        schedule: Schedule | None = None,
    ) -> None:
        assert setting.policy == spec.name, f"setting is for '{setting.policy}', not '{spec.name}'"
        spec.signal_of(setting.signal, spec.signals)
        self.spec = spec
        self.step_count = step_count
        self._schedule = schedule or Schedule.even(step_count)
        assert len(self._schedule) == step_count, "a schedule of as many steps"
        self._decide = decide
        self._exact_steps = frozenset(setting.guard.exact_steps)
        limits = setting.guard.model_dump(include=set(GUARD_PARAMETERS))
        parameters = spec.resolve(setting.parameters)
        self._depth = spec.history.kept(parameters)
        self._constants = {
            **_prefixed("param.", parameter_tensors(spec.parameters, parameters)),
            **_prefixed("guard.", parameter_tensors(GUARD_PARAMETERS, limits)),
        }
        self.reset()

    @classmethod
    def eager(
        cls, setting: CacheSetting, *, step_count: int, schedule: Schedule | None = None
    ) -> DecisionLoop:
        """Return the Python law of the setting's policy.

        Raises:
            ConfigError: policy or parameter unknown, or a bad value.
        """
        module = Guarded(policy(setting.policy))
        return cls(module.spec, module, setting, step_count=step_count, schedule=schedule)

    def reset(self) -> None:
        """Forget the run: the next decision is about step 0."""
        self.step_index = 0
        self.last_computed: int | None = None
        self.computed_steps: list[int] = []
        self._past: dict[str, Tensor] = {}
        self._state = {
            **_prefixed("state.", initial_tensors(self.spec.state)),
            **_prefixed("guard_state.", initial_tensors(GUARD_STATE)),
        }

    def decide(
        self,
        signal: Array | None = None,
        feature: Array | None = None,
        gram: Array | None = None,
        pace: Pace = NO_HURRY,
    ) -> DecisionRecord:
        """Decide about the next step and move on to the one after it.

        Args:
            signal: float32 [rows, width], at this step; needed where the policy declares one.
            feature: float32 [frames, tokens_per_frame, channels], tapped at the last computed step;
                needed where the policy declares one and a step was computed.
            gram: float32 [history.maximum, history.maximum], of the residuals of ``computed_steps``;
                needed where the policy keeps it and a step was computed. `difference_gram` makes it.
            pace: Against a deadline.

        Returns:
            The decision; it is taken to be followed.
        """
        assert self.step_index < self.step_count, f"the run has {self.step_count} steps only"
        inputs = self._inputs(signal, feature, gram)
        inputs |= {name: torch.tensor(value) for name, value in pace._asdict().items()}
        with torch.no_grad():
            outputs = self._decide(inputs)
        self._state = {name: outputs[f"new_{name}"].clone() for name in self._state}
        record = self._record(outputs)
        if record.compute:
            if "signal" in self._past:
                computed = self._past.get("computed_signal")
                zeros = torch.zeros_like(self._past["signal"])
                self._past["older_signal"] = zeros if computed is None else computed
                self._past["computed_signal"] = self._past["signal"]
            self.last_computed = self.step_index
            self.computed_steps = [self.step_index, *self.computed_steps][: self._depth]
        self.step_index += 1
        return record

    def _inputs(
        self, signal: Array | None, feature: Array | None, gram: Array | None
    ) -> dict[str, Tensor]:
        held, schedule = self.computed_steps, self._schedule
        inputs = {
            "step_index": torch.tensor(self.step_index),
            "step_count": torch.tensor(self.step_count),
            "computed_steps": self._padded(held, -1),
            "exact": torch.tensor(self.step_index in self._exact_steps),
            "timestep": torch.tensor(schedule.timesteps[self.step_index]),
            "sigma": torch.tensor(schedule.sigmas[self.step_index]),
            "computed_timesteps": self._padded([schedule.timesteps[s] for s in held], 0.0),
            "computed_sigmas": self._padded([schedule.sigmas[s] for s in held], 0.0),
            **self._constants,
            **self._state,
        }
        if self.spec.signals:
            assert signal is not None, f"policy '{self.spec.name}' needs a signal"
            inputs |= self._rotate("signal", _float32(signal), is_new=True)
        if self.spec.feature:
            is_new = self.step_index > 0 and self.last_computed == self.step_index - 1
            assert feature is not None or not is_new, f"policy '{self.spec.name}' needs a feature"
            tapped = _float32(feature) if feature is not None else torch.zeros(1, 1, 1)
            inputs |= self._rotate("feature", tapped, is_new=is_new)
        if "gram" in self.spec.kept:
            size = self.spec.history.maximum
            assert gram is not None or not held, f"policy '{self.spec.name}' needs a gram"
            inputs["gram"] = _float32(np.zeros((size, size)) if gram is None else gram)
        return inputs

    def _padded(self, values: Sequence[float], rest: float) -> Tensor:
        size = self.spec.history.maximum
        return torch.tensor([*values, *[rest] * size][:size])

    def _rotate(self, name: str, value: Tensor, *, is_new: bool) -> dict[str, Tensor]:
        """Return a tensor and its predecessor, moving on by one where the value is a new one."""
        zeros = torch.zeros_like(value)
        if is_new:
            self._past[f"previous_{name}"] = self._past.get(name, zeros)
            self._past[name] = value
        roles = (name, f"previous_{name}", f"computed_{name}", f"older_{name}")
        return {n: self._past.get(n, zeros) for n in roles if n == name or n in self.spec.kept}

    def _record(self, outputs: Mapping[str, Tensor]) -> DecisionRecord:
        reported = self.spec.distance
        return DecisionRecord(
            compute=bool(outputs["compute"]),
            mix=[float(factor) for factor in outputs["mix"]],
            distance=None if reported is None else float(outputs[f"new_state.{reported}"]),
        )


def difference_gram(residuals: Sequence[Array], size: int) -> Tensor:
    """Return what sessions give a policy that keeps ``gram``.

    Args:
        residuals: Newest first, of any shape, at most ``size`` of them.
        size: The policy's ``history.maximum``.

    Returns:
        float32 [size, size]: mean products of the elements of the newest residual and of each
        difference of one and the next older one; zeros where there are none.
    """
    if not residuals:
        return torch.zeros(size, size)
    flat = torch.stack([torch.as_tensor(r).double().flatten() for r in residuals])
    rows = torch.cat([flat[:1], flat[:-1] - flat[1:]])
    found = torch.zeros(size, size, dtype=torch.float64)
    found[: len(rows), : len(rows)] = rows @ rows.T / rows.shape[1]
    return found.float()


def _float32(array: Array) -> Tensor:
    return torch.as_tensor(array, dtype=torch.float32).clone()


def _prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
