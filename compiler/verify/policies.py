# SPDX-License-Identifier: Apache-2.0
"""Compare compiled policies with their Python laws, step by step over random runs.

`policies.decision_loop.DecisionLoop` drives the eager law. At every step the compiled graph is given the very same
inputs, state included, and must answer the same: so one difference is one finding, and rounding
does not add up over a run.

Two correct float32 implementations may differ where a distance lies within `TIE` of a threshold.
Which of a policy's parameters are thresholds is its own affair; a difference is a tie if the
*eager* law gives the compiled answer once one of its float parameters is moved by that much.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...engines.base import BoundCall, Engine
from ...policies import policy as find_policy
from ...policies.deadline import Pace
from ...policies.decision_loop import DecideFunction, DecisionLoop, difference_gram
from ...policies.guard import Guarded
from ...policies.setting import CacheSetting, GuardSetting
from ...policies.spec import ParameterSpec, PolicySpec, Value

__all__ = [
    "SHAPES",
    "CompiledDecide",
    "PolicyCheck",
    "check_policy",
    "random_settings",
]

TIE = 1e-5
"""Relative distance from a threshold within which both answers are right."""

STATE_TOLERANCE = 1e-5
"""Of each float state, absolute below 1 and relative above: it ends a mean over a signal."""

STEPS = (24, 9)
RANDOM_SETTINGS = 6
TABLE = 600
"""Elements of a random table at most."""

Tensors = Mapping[str, Tensor]
Shapes = Mapping[str, tuple[int, ...]]

SHAPES: Shapes = {"signal": (3, 8), "feature": (4, 5, 6)}
"""Of what a policy looks at, where its graph takes any size."""


@dataclass(frozen=True)
class PolicyCheck:
    """One compiled policy against its law.

    Attributes:
        policy: Policy name.
        form: Backend, or ``onnx`` for the portable graph in ONNX Runtime.
        settings: Parameter settings tried.
        decisions: Decisions compared.
        reused: Of these, reuses.
        ties: Differences that lie within `TIE` of a threshold.
        mix_error: Greatest difference of a mix factor, in units of max(1, its size).
        mix_tolerance: Greatest one that is no fault: the policy's own.
        faults: Differences, each told in a line.
    """

    policy: str
    form: str
    settings: int
    decisions: int
    reused: int
    ties: int
    mix_error: float
    mix_tolerance: float
    faults: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing differed but ties."""
        return not self.faults

    def as_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {**asdict(self), "faults": list(self.faults), "ok": self.ok}


class CompiledDecide:
    """A compiled policy as the function that `DecisionLoop` drives; bound once per shape of its inputs."""

    def __init__(
        self, engine: Engine, device: torch.device, synchronize: Callable[[], None]
    ) -> None:
        self._engine, self._device, self._synchronize = engine, device, synchronize
        self._bound: dict[tuple[Any, ...], tuple[dict[str, Tensor], BoundCall]] = {}

    def __call__(self, inputs: Tensors) -> dict[str, Tensor]:
        """Return every output; inputs that the graph lacks are left out."""
        taken = {n: inputs[n] for n in self._engine.inputs}
        key = tuple((n, *t.shape) for n, t in taken.items())
        if key not in self._bound:
            values = {n: t.to(self._device).clone() for n, t in taken.items()}
            for name, spec in self._engine.outputs.items():
                shape = [d for d in spec.shape if isinstance(d, int)]
                dtype = getattr(torch, spec.dtype)
                values[name] = torch.zeros(shape, dtype=dtype, device=self._device)
            self._bound[key] = values, self._engine.bind(values)
        values, call = self._bound[key]
        for name, tensor in taken.items():
            values[name].copy_(tensor)
        call.run()
        self._synchronize()
        return {n: values[n].cpu().clone() for n in self._engine.outputs}


class _Judge:
    """Asks both laws at every step and keeps what differs; answers as the eager one."""

    def __init__(self, eager: Guarded, compiled: DecideFunction, about: str) -> None:
        self._eager, self._compiled, self._about = eager, compiled, about
        self.decisions = self.reused = self.ties = 0
        self.mix_error = 0.0
        self.faults: list[str] = []

    def __call__(self, inputs: dict[str, Tensor]) -> Mapping[str, Tensor]:
        expected: Mapping[str, Tensor] = self._eager(inputs)
        found = self._compiled(dict(inputs))
        self.decisions += 1
        tolerance = self._eager.policy.mix.tolerance
        fault = disagreement(expected, found, tolerance)
        if fault is not None:
            nearby = (disagreement(self._eager(v), found, tolerance) for v in nudged(inputs))
            if any(other is None for other in nearby):
                self.ties += 1
            else:
                self.faults.append(f"{self._about}, step {int(inputs['step_index'])}: {fault}")
        elif not bool(expected["compute"]):
            self.reused += 1
            self.mix_error = max(self.mix_error, _mix_error(expected["mix"], found["mix"]))
        return expected


def check_policy(
    spec: PolicySpec,
    compiled: DecideFunction,
    settings: Sequence[CacheSetting],
    *,
    form: str,
    shapes: Shapes = SHAPES,
    seed: int = 0,
) -> PolicyCheck:
    """Compare a compiled policy with its law over random runs.

    Args:
        spec: The declaration that the bundle carries.
        compiled: The compiled graph.
        settings: Parameters and guards to try, defaults first.
        form: What it was compiled by, for the report.
        shapes: Of the random ``signal`` and ``feature``.
        seed: Of the runs.
    """
    eager = Guarded(find_policy(spec.name))
    judges = []
    for index, setting in enumerate(settings):
        rng = np.random.default_rng((seed, index))
        steps = STEPS[index % len(STEPS)]
        told = ", ".join(f"{n}={v}" for n, v in setting.parameters.items()) or "defaults"
        judge = _Judge(eager, compiled, f"policy '{spec.name}' with {told}")
        drive(DecisionLoop(spec, judge, setting, step_count=steps), rng, shapes)
        judges.append(judge)
    return PolicyCheck(
        policy=spec.name,
        form=form,
        settings=len(settings),
        decisions=sum(j.decisions for j in judges),
        reused=sum(j.reused for j in judges),
        ties=sum(j.ties for j in judges),
        mix_error=max((j.mix_error for j in judges), default=0.0),
        mix_tolerance=eager.policy.mix.tolerance,
        faults=tuple(f for j in judges for f in j.faults),
    )


def random_settings(
    spec: PolicySpec, count: int = RANDOM_SETTINGS, seed: int = 0
) -> list[CacheSetting]:
    """Return the policy's defaults, then random parameters and guards, each in its range."""
    rng = np.random.default_rng(seed)
    settings = [CacheSetting(policy=spec.name)]
    for _ in range(count):
        guard = GuardSetting(
            first_exact=int(rng.integers(0, 3)),
            last_exact=int(rng.integers(0, 3)),
            max_consecutive=int(rng.integers(0, 5)),
            max_reused=int(rng.choice([0, 0, 6])),
            exact_steps=[int(s) for s in rng.integers(0, STEPS[0], 2)],
        )
        parameters = {n: random_value(p, rng) for n, p in spec.parameters.items()}
        for name, declared in spec.parameters.items():
            if declared.listed_in is not None:
                parameters[name] = int(rng.choice(parameters[declared.listed_in]))
        settings.append(CacheSetting(policy=spec.name, parameters=parameters, guard=guard))
    return settings


def random_value(spec: ParameterSpec, rng: np.random.Generator) -> Value:
    """Return a value in its range: floats around the default, integers mostly near the least."""
    if spec.choices is not None:
        return str(rng.choice(spec.choices))
    if spec.dtype == "bool":
        return bool(rng.random() < 0.5)
    if spec.shape:
        assert isinstance(spec.default, list), "a parameter with a shape has a list as default"
        told = spec.default
        if len(told) == 1 and spec.pad == "edge":  # a table that is nothing by default
            told = told * min(spec.shape[0], TABLE)
        if spec.dtype == "int64":
            return [_integer(spec, rng) for _ in told]
        return [_near(spec, v, rng) for v in told]
    assert isinstance(spec.default, int | float), "a number's default is a number"
    return _integer(spec, rng) if spec.dtype == "int64" else _near(spec, spec.default, rng)


def drive(law: DecisionLoop, rng: np.random.Generator, shapes: Shapes = SHAPES) -> None:
    """Let a law decide about every step of a random run: smooth walks of signal and feature."""
    signals = _walk(law.step_count, shapes["signal"], rng)
    features = _walk(law.step_count, shapes["feature"], rng)
    residuals = _walk(law.step_count, (16,), rng)
    hurry = np.random.default_rng(law.step_count)
    is_hurried = bool(hurry.random() < 0.5)
    for step in range(law.step_count):
        # Before the first computed step zeros stand in, of the size that a session allocates.
        tapped = 0 * features[0] if law.last_computed is None else features[law.last_computed]
        held = [residuals[s] for s in law.computed_steps]
        gram = difference_gram(held, law.spec.history.maximum)
        pace = Pace(*hurry.uniform((0.0, 0.5, 0.01), (law.step_count, 1.0, 0.2)).tolist())
        law.decide(signals[step], tapped, gram, pace if is_hurried else Pace())


def disagreement(expected: Tensors, found: Tensors, mix_tolerance: float) -> str | None:
    """Say in what two answers differ beyond tolerance, or None. A mix counts on reused steps."""
    if bool(expected["compute"]) != bool(found["compute"]):
        law, graph = ("compute" if bool(a["compute"]) else "reuse" for a in (expected, found))
        return f"law says {law}, graph says {graph}"
    if not bool(expected["compute"]):
        error = _mix_error(expected["mix"], found["mix"])
        if not error <= mix_tolerance:
            return f"mix is {found['mix'].tolist()}, law says {expected['mix'].tolist()}"
    for name, value in expected.items():
        if name in ("compute", "mix"):
            continue
        other = found[name]
        if value.dtype.is_floating_point:
            same = bool(torch.allclose(other, value, rtol=STATE_TOLERANCE, atol=STATE_TOLERANCE))
        else:
            same = bool(torch.equal(other, value))
        if not same:
            return f"'{name}' is {other.tolist()}, law says {value.tolist()}"
    return None


def nudged(inputs: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Yield the inputs with one float parameter at a time moved by `TIE`, up and down."""
    for name, value in inputs.items():
        if name.startswith("param.") and value.dtype.is_floating_point:
            for factor in (1 - TIE, 1 + TIE):
                yield {**inputs, name: value * factor}


def _integer(spec: ParameterSpec, rng: np.random.Generator) -> int:
    """Return one of the range, every order of magnitude above its least as often."""
    least = int(spec.minimum or 0)
    most = least + 6 if spec.maximum is None else int(spec.maximum)
    return least - 1 + round(math.pow(most - least + 1, rng.random()))


def _near(spec: ParameterSpec, default: float, rng: np.random.Generator) -> float:
    value = 0.05 * float(rng.standard_normal())
    if default:
        value = default * float(rng.lognormal(0, 0.5))
    low = -np.inf if spec.minimum is None else spec.minimum
    high = np.inf if spec.maximum is None else spec.maximum
    return float(np.clip(value, low, high))


def _walk(steps: int, shape: tuple[int, ...], rng: np.random.Generator) -> Any:
    pace = 0.06 * rng.uniform(0.2, 2.0, (steps, *[1] * len(shape)))
    moves = rng.standard_normal((steps, *shape)) * pace
    return (np.cumsum(moves, axis=0) + rng.standard_normal(shape)).astype(np.float32)


def _mix_error(expected: Tensor, found: Tensor) -> float:
    return float(((found - expected).abs() / expected.abs().clamp(min=1)).max())
