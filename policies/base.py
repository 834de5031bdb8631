# SPDX-License-Identifier: Apache-2.0
"""The contract of a cache policy: a pure function of tensors that is traced, compiled and shipped.

No runtime contains policy code. A policy is a `torch.nn.Module` without weights whose `decide`
uses torch operations only (no Python branch on a tensor's value), so that one graph serves every
step, step count, parameter value and signal shape.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from .config import CachingConfig
from .spec import HistorySpec, Kept, ParameterSpec, PolicySpec, StateSpec

__all__ = [
    "HOLD",
    "Decision",
    "Mix",
    "Mixed",
    "Policy",
    "Step",
    "hold",
    "relative_change",
    "reuse_below",
]


class Step(NamedTuple):
    """Where the run stands; every field is an input of the compiled graph.

    Attributes:
        step_index: int64 [], loop counter, 0-based.
        step_count: int64 [], steps of the run.
        computed_steps: int64 [history.maximum], indices of the last computed steps, newest first,
            -1 where the history does not reach.
        must_compute: bool [], the guard's verdict: this step is computed whatever the law says.
        timestep: float32 [], what the model is conditioned on at this step.
        sigma: float32 [], noise level that this step starts from; 1 is pure noise in flow models.
        computed_timesteps: float32 [history.maximum], of the steps in ``computed_steps``; 0 where
            the history does not reach.
        computed_sigmas: float32 [history.maximum], likewise.
        seconds_left: float32 [], until the run's deadline; `deadline.NO_DEADLINE` where it has none.
        computed_seconds: float32 [], that a computed step takes; 0 where none was measured.
        reused_seconds: float32 [], likewise of a reused step.
    """

    step_index: Tensor
    step_count: Tensor
    computed_steps: Tensor
    must_compute: Tensor
    timestep: Tensor
    sigma: Tensor
    computed_timesteps: Tensor
    computed_sigmas: Tensor
    seconds_left: Tensor
    computed_seconds: Tensor
    reused_seconds: Tensor


class Decision(NamedTuple):
    """What a policy answers for one branch at one step.

    Attributes:
        compute: bool [], True runs the body.
        state: The new value of every state tensor that the decision declares.
    """

    compute: Tensor
    state: dict[str, Tensor]


class Mixed(NamedTuple):
    """What a mix law answers for one branch at one step.

    Attributes:
        mix: float32 [history.maximum], factor of each past residual, newest first; read only
            when the step is reused.
        state: The new value of every state tensor that the mix declares.
    """

    mix: Tensor
    state: dict[str, Tensor]


MixLaw = Callable[[Step, Tensor, dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]], Mixed]
"""Takes step, signal, kept, state and parameters, each as `Policy.decide` does."""


def hold(step: Step) -> Tensor:
    """Return the mix that repeats the newest residual, [1, 0, …]."""
    return (torch.arange(step.computed_steps.shape[0]) == 0).to(torch.float32)


def relative_change(new: Tensor, old: Tensor) -> Tensor:
    """Return mean|new − old| / mean|old|, float32 []; not finite where old is zero."""
    return (new - old).abs().mean() / old.abs().mean()


def reuse_below(must_compute: Tensor, distance: Tensor, threshold: Tensor) -> Decision:
    """Reuse while a distance is below a threshold, else compute and put it back to 0.

    A distance that is not finite is below none.

    Args:
        must_compute: bool [], whether to compute whatever the distance is.
        distance: float32 [], this step's change included; the state ``distance``.
        threshold: float32 [].
    """
    compute = must_compute | ~(distance < threshold)
    return Decision(compute, {"distance": torch.where(compute, 0.0, distance)})


def _held(
    step: Step,
    signal: Tensor,
    kept: dict[str, Tensor],
    state: dict[str, Tensor],
    parameters: dict[str, Tensor],
) -> Mixed:
    return Mixed(hold(step), {})


def _one_form(parameters: Mapping[str, Any]) -> str:
    return ""


@dataclass(frozen=True)
class Mix:
    """A mix law with what it declares: what stands for a residual that is not computed.

    A policy has one, and its spec holds all that the mix declares. Another policy's decisions may
    take it too (`policies.pairs`), and its policy's decisions another mix: names of parameters and
    state are of no decision law, and its own policy's decision reads nothing that it declares.

    Attributes:
        law: torch operations only.
        history: Residuals it mixes.
        signals: Signal kinds that it can look at; empty where it looks at none.
        kept: Inputs of the past that it reads.
        state: Small tensors that it carries from step to step.
        parameters: Runtime inputs that it reads.
        tolerance: How far a factor may lie from another right float32 computation of it, absolute
            below 1 and relative above: a handful of operations, or a small solve.
        bound: Why it serves no other policy's decisions; empty where it does.
        form: Names the form of the law that some resolved parameters are; empty where there is one.
    """

    law: MixLaw
    history: HistorySpec
    signals: tuple[str, ...] = ()
    kept: tuple[Kept, ...] = ()
    state: Mapping[str, StateSpec] = field(default_factory=dict)
    parameters: Mapping[str, ParameterSpec] = field(default_factory=dict)
    tolerance: float = 1e-6
    bound: str = ""
    form: Callable[[Mapping[str, Any]], str] = _one_form


HOLD = Mix(law=_held, history=HistorySpec(maximum=1))
"""The newest residual once more."""


class Policy(torch.nn.Module):
    """A decision law with its declared state and parameters, and the mix law that goes with it.

    Subclasses set ``spec`` and write `decide`. State is passed in and returned, never held, so
    branches and requests can't leak into each other.

    Attributes:
        spec: What runtimes need to know to run the policy, all that ``mix`` declares included.
        mix: What stands for a residual that is not computed.
        config: The keys of its JSON configs; None takes the policy's name as ``feature_caching``
            and every parameter by its own name.
    """

    spec: ClassVar[PolicySpec]
    mix: ClassVar[Mix] = HOLD
    config: ClassVar[type[CachingConfig] | None] = None

    @abstractmethod
    def decide(
        self,
        step: Step,
        signal: Tensor,
        feature: Tensor,
        kept: dict[str, Tensor],
        state: dict[str, Tensor],
        parameters: dict[str, Tensor],
    ) -> Decision:
        """Decide whether the coming step is computed, before it runs.

        Args:
            step: Where the run stands.
            signal: float32 [rows, width], the declared signal at this step; [1, 1] zeros where
                the policy declares none.
            feature: float32 [frames, tokens_per_frame, channels], the declared feature of the last
                computed step (batch element 0 of the branch); [1, 1, 1] zeros where none.
            kept: The declared tensors of the past, shaped like ``signal`` or ``feature``, and
                ``gram``: float32 [history.maximum, history.maximum], mean products of the elements
                of the newest residual, of it minus the one before it, of that one minus the next,
                and so on. Before there is a past they hold zeros.
            state: The declared state, as the last step returned it or as declared initially.
            parameters: The declared parameters, as tensors of their declared dtype and shape.

        Returns:
            The decision. ``compute`` must be True wherever ``step.must_compute`` is.
        """
