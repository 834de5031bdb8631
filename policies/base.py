# SPDX-License-Identifier: Apache-2.0
"""The contract of a cache policy: a pure function of tensors that is traced, compiled and shipped.

No runtime contains policy code. A policy is a `torch.nn.Module` without weights whose `decide`
uses torch operations only (no Python branch on a tensor's value), so that one graph serves every
step, step count, parameter value and signal shape.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from .config import CachingConfig
from .spec import PolicySpec

__all__ = ["Decision", "Policy", "Step", "hold"]


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
    """

    step_index: Tensor
    step_count: Tensor
    computed_steps: Tensor
    must_compute: Tensor
    timestep: Tensor
    sigma: Tensor
    computed_timesteps: Tensor
    computed_sigmas: Tensor


class Decision(NamedTuple):
    """What a policy answers for one branch at one step.

    Attributes:
        compute: bool [], True runs the body.
        mix: float32 [history.maximum], factor of each past residual, newest first; read only
            when the step is reused.
        state: The new value of every declared state tensor.
    """

    compute: Tensor
    mix: Tensor
    state: dict[str, Tensor]


class Policy(torch.nn.Module):
    """A decision law and a mix law with their declared state and parameters.

    Subclasses set ``spec`` and write `decide`. State is passed in and returned, never held, so
    branches and requests can't leak into each other.

    Attributes:
        spec: What runtimes need to know to run the policy.
        config: The keys of its JSON configs; None takes the policy's name as ``feature_caching``
            and every parameter by its own name.
        mix_tolerance: How far a factor of the mix may lie from another right float32 computation of
            it, absolute below 1 and relative above: a handful of operations, or a small solve.
    """

    spec: ClassVar[PolicySpec]
    config: ClassVar[type[CachingConfig] | None] = None
    mix_tolerance: ClassVar[float] = 1e-6

    @classmethod
    def form(cls, parameters: Mapping[str, Any]) -> str:
        """Return which form of the law these parameters are; empty where there is one form.

        Args:
            parameters: Resolved, by name.
        """
        return ""

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


def hold(step: Step) -> Tensor:
    """Return the mix that repeats the newest residual, [1, 0, …]."""
    newest = torch.zeros_like(step.computed_steps)
    newest[0] = 1
    return newest.to(torch.float32)
