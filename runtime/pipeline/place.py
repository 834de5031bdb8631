# SPDX-License-Identifier: Apache-2.0
"""Tell which step and branch of a run each call of a transformer is."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ...bundle.manifest import InputEntry
from ...bundle.streams import LATENTS, beside
from ...core.errors import RequestError

__all__ = ["Begun", "RunPlace", "calling_pipeline"]

PLACE_HINT = (
    "name the branch with transformer.cache_context('cond') or ('uncond'), set the timesteps of "
    "the calling pipeline's scheduler before the run and leave them, or attach to this pipeline"
)


@dataclass(frozen=True)
class Begun:
    """What a run that begins runs through.

    Attributes:
        timesteps: float32 [steps].
        sigmas: [steps], the scheduler's noise levels, or None where it has none.
        beside: Latents beside the first → [steps], their timesteps.
    """

    timesteps: Tensor
    sigmas: Tensor | None
    beside: Mapping[str, Tensor]


class RunPlace:
    """Where a run stands.

    A run begins at the timestep of its first call and goes on over the scheduler's. The branch is
    diffusers' cache context; without one, calls of equal prompts are one branch.

    Attributes:
        context: What diffusers says about the call under way: the branch's ``name``, and in newer
            versions the ``step_index``.
        done: Branch → its last step.
    """

    def __init__(self, timestep: InputEntry, *, takes_over: bool) -> None:
        """Stand before any run.

        Args:
            timestep: The input that is the step's own timestep, or its vector of them.
            takes_over: Whether the transformer goes on where another one left off.
        """
        self._entry, self._takes_over = timestep, takes_over
        self.forget()

    def forget(self) -> None:
        """Forget the run: the next call begins one."""
        self.context: dict[str, Any] = {}
        self.done: dict[str, int] = {}
        self._scheduler: Any = None
        self._source: Any = None  # the scheduler's timesteps when the run began
        self._offset = 0  # what diffusers calls the run's first step
        self._steps = torch.zeros(0, 1)  # the timesteps of each step
        self._last = -1  # step of any branch
        self._unnamed: dict[str, dict[str, Tensor]] = {}  # branch without a context → its prompt

    def find(
        self, scheduler: Any, prompt: Mapping[str, Tensor], timestep: Tensor
    ) -> tuple[str, int] | None:
        """Return branch and step of a call that goes on with the run; None if it begins another.

        Raises:
            RequestError: it is neither.
        """
        if scheduler is not self._scheduler or scheduler.timesteps is not self._source:
            return None
        branch = self.branch(prompt, timestep)
        step_index = self._continued(branch, timestep)
        return None if step_index is None else (branch, step_index)

    def begin(self, pipe: Any, timestep: Tensor, serves: Callable[[Tensor], Tensor]) -> Begun:
        """Begin a run over the scheduler's timesteps from this one on, as far as they are served.

        Args:
            pipe: The pipeline that calls.
            timestep: Of the first call.
            serves: Timesteps → whether the transformer denoises there, bool [steps].

        Raises:
            RequestError: the scheduler has no such timestep.
        """
        scheduler = pipe.scheduler
        timesteps = torch.as_tensor(scheduler.timesteps).float()
        table = torch.stack([_timesteps_of(pipe, of) for of in self._entry.of], dim=1)
        found = [i for i, wanted in enumerate(table) if self.is_at(wanted, timestep)]
        said = self.context.get("step_index")
        # A pipeline's own count begins at 0, but for an expert that takes over.
        if not found or (said and not self._takes_over):
            raise self._unplaced(timestep)
        rest = timesteps[found[0] :]
        is_mine = serves(rest)
        mine = rest[is_mine]
        steps = table[found[0] :][is_mine]
        if not len(steps) or not self.is_at(steps[0], timestep):
            raise self._unplaced(timestep)
        sigmas = getattr(scheduler, "sigmas", None)  # diffusers' end in one more, the last level
        if sigmas is not None:
            sigmas = torch.as_tensor(sigmas)[found[0] : len(timesteps)].to(rest)[is_mine]
        others = dict(zip(self._entry.of, steps.unbind(1), strict=True))
        others.pop(LATENTS)
        self._steps, self._last = steps, -1
        self._scheduler, self._source = scheduler, scheduler.timesteps
        self._offset, self.done, self._unnamed = said or 0, {}, {}
        return Begun(mine, sigmas, others)

    def branch(self, prompt: Mapping[str, Tensor], timestep: Tensor) -> str:
        """Return the branch of a call: its cache context's, else the run's one of the same prompt.

        A prompt that no branch has is the first branch's that has not run this step yet (a prompt
        may change during a run), else a new branch's.
        """
        if said := self._said_branch():
            return said
        for name, known in self._unnamed.items():
            if known.keys() == prompt.keys() and all(
                _is_same(known[n], tensor) for n, tensor in prompt.items()
            ):
                return name
        goes_on = self._last >= 0 and self.is_at(self._steps[self._last], timestep)
        step_index = self._last if goes_on else self._last + 1
        waiting = [n for n in self._unnamed if self.done.get(n, -1) < step_index]
        count = len(self._unnamed)
        new = ("cond", "uncond")[count] if count < 2 else f"branch_{count}"
        name = waiting[0] if waiting else new
        self._unnamed[name] = {n: tensor.clone() for n, tensor in prompt.items()}
        return name

    def end_step(self, branch: str, step_index: int) -> None:
        """Note that a branch has run a step."""
        self.done[branch] = self._last = step_index

    def is_at(self, wanted: Tensor, timestep: Tensor) -> bool:
        """Tell whether a step's timesteps are the ones given, which may have been divided before."""
        return bool(self._are_close(wanted, timestep).any(0).all())

    def own_indices(self, step_index: int, timestep: Tensor) -> Tensor:
        """Return which of the step's timesteps each of those given is, int64 [given]."""
        return self._are_close(self._steps[step_index], timestep).int().argmax(0)

    def _said_branch(self) -> str | None:
        """Return the branch that the cache context names, if it names one.

        What diffusers' guiders call ``pred_uncond`` is ``uncond``, as pipelines and configs call it.
        """
        name = self.context.get("name")
        return None if name is None else str(name).removeprefix("pred_")

    def _continued(self, branch: str, timestep: Tensor) -> int | None:
        """Return the step of a call that goes on with the run; None if it begins another."""
        done, table = self.done.get(branch, -1), self._steps
        for step_index in (self._last, self._last + 1):
            if done < step_index < len(table) and self.is_at(table[step_index], timestep):
                said = self.context.get("step_index")
                if said is not None and said != step_index + self._offset:
                    raise self._unplaced(timestep)
                return step_index
        if (
            self._last > 0
            and self._said_branch() is None
            and self.is_at(table[self._last], timestep)
        ):
            raise self._unplaced(timestep)  # two branches of one prompt
        return None

    def _are_close(self, wanted: Tensor, timestep: Tensor) -> Tensor:
        """Compare each timestep of a step with each given, bool [wanted, given].

        What was subtracted from another number lost digits of its own.
        """
        lost = 1e-8 + 1e-7 * abs(self._entry.offset)
        given = timestep.to(wanted.device)
        return torch.isclose(wanted.reshape(-1, 1), given.reshape(1, -1), rtol=1e-6, atol=lost)

    def _unplaced(self, timestep: Tensor) -> RequestError:
        return RequestError(
            f"transformer call at timestep {float(timestep[0]):g}",
            f"can't be placed: no run of the scheduler's timesteps has a step of branch "
            f"'{self._said_branch() or 'cond'}' there after step {self._last}",
            PLACE_HINT,
        )


def calling_pipeline(attached_to: Any) -> Any:
    """Return the pipeline that calls, else the one attached to.

    Args:
        attached_to: It, or None where it is gone.

    Raises:
        RequestError: there is neither.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if "self" in frame.f_code.co_varnames[: frame.f_code.co_argcount]:
            caller = frame.f_locals.get("self")
            if isinstance(caller, DiffusionPipeline) and hasattr(caller, "scheduler"):
                return caller
        frame = frame.f_back  # type: ignore[assignment]  # the outermost frame's is None
    if attached_to is None:
        raise RequestError(
            "transformer",
            "is called by no pipeline, and the one that it was attached to is gone",
            PLACE_HINT,
        )
    return attached_to


def _timesteps_of(pipe: Any, latents: str) -> Tensor:
    """Return the timesteps of some latents: of their own scheduler, beside the first's."""
    scheduler = getattr(pipe, beside(latents, LATENTS, "scheduler"), None)
    if scheduler is None:
        raise RequestError(
            f"pipeline, '{beside(latents, LATENTS, 'scheduler')}'",
            "is missing",
            "attach to a pipeline of the bundle's model",
        )
    return torch.as_tensor(scheduler.timesteps).float()


def _is_same(first: Tensor, second: Tensor) -> bool:
    """Tell whether two tensors are equal, dtype and device included."""
    alike = first.dtype == second.dtype and first.device == second.device
    return alike and torch.equal(first, second)
