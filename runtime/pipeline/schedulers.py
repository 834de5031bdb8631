# SPDX-License-Identifier: Apache-2.0
"""Schedulers of diffusers by the names that runs ask for, and that of distilled models."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import diffusers
from diffusers import FlowMatchEulerDiscreteScheduler

from ...bundle.sampler import DISTILLED, SAMPLERS, step_list
from ...core.errors import RequestError

__all__ = ["StepListScheduler", "make_scheduler"]

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "num_train_timesteps": 1000}


class StepListScheduler(FlowMatchEulerDiscreteScheduler):
    """Euler over the timesteps that a distilled model was trained at.

    Attributes:
        step_list: These, of 1000 and before the flow shift, falling; empty spreads the steps of a
            run evenly from 1000 on: 1000, 750, 500, 250 of four.
    """

    step_list: tuple[float, ...] = ()

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Any = None, **others: Any
    ) -> None:
        """Set the timesteps of a run.

        Raises:
            RequestError: a run of another length than the list, or of given timesteps.
        """
        given = sorted(name for name, value in others.items() if value is not None)
        if given or num_inference_steps is None:
            raise RequestError(
                f"sampler '{DISTILLED}'",
                f"is given {', '.join(given) or 'no step count'}",
                "give a number of steps alone: the model was distilled at its own timesteps",
            )
        steps = num_inference_steps
        levels = self.step_list or [1000 * (steps - i) / steps for i in range(steps)]
        if len(levels) != steps:
            raise RequestError(
                f"--steps {steps}",
                f"is not the {len(levels)} steps of the list {list(levels)}",
                f"use --steps {len(levels)}, or --sampler {DISTILLED}, which spreads any number",
            )
        sigmas = [level / 1000 for level in levels]
        super().set_timesteps(steps, device=device, sigmas=sigmas)  # type: ignore[misc]  # diffusers is lazy


def make_scheduler(name: str, flow_shift: float, config: Mapping[str, Any] | None = None) -> Any:
    """Return a fresh scheduler.

    Args:
        name: A key of `SAMPLERS`, what `list_sampler` returned, or a class of diffusers.
        flow_shift: Shift of the noise levels towards high noise; 1 shifts nothing.
        config: The pipeline's own scheduler config, where it is of this class.
    """
    steps = step_list(name)
    scheduler_class: Any = StepListScheduler
    if steps is None and name != DISTILLED:
        scheduler_class = getattr(diffusers, SAMPLERS.get(name, name))
    # Signatures, since a class of diffusers takes keywords beyond its own without a word.
    signed = FlowMatchEulerDiscreteScheduler if scheduler_class is StepListScheduler else None
    known = inspect.signature((signed or scheduler_class).__init__).parameters
    shift = "flow_shift" if "flow_shift" in known else "shift"
    # Shifting by the latents' size, as some pipelines do, is a shift of exp(mu): ask for that one.
    wanted = {**(config or FLOW), shift: flow_shift, "use_dynamic_shifting": False}
    scheduler = scheduler_class(**{n: v for n, v in wanted.items() if n in known})
    if steps is not None:
        scheduler.step_list = steps
    return scheduler
