# SPDX-License-Identifier: Apache-2.0
"""A step as others see it: shown to a recorder when it is done, or taken apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from ..bundle.sections import Sections
from ..bundle.streams import HIDDEN
from ..engines.base import BoundCall
from ..policies.schedule import Schedule
from .body import Body

__all__ = ["OpenStep", "Recorder", "StepRecord"]


@dataclass(frozen=True)
class StepRecord:
    """What a recorder is shown of one step; tensors are views, valid during the call.

    Attributes:
        branch: Branch name.
        step_index: 0-based.
        computed: Whether the body ran.
        residual: [batch, tokens, channels], the body's or what was reused in its place.
        feature: [batch, tokens, channels], the tapped feature; None on reused steps.
        signals: Hidden-sized signals that the model has, [batch, tokens, channels] float32, by the
            value that carries them; empty where not asked for.
        model_output: [batch, out channels, …], float32.
        buffers: What graphs of this step read, by name: ``latents``, ``hidden`` (the body's input),
            this step's rows of the per-run tables, the prompt's context, ….
        sections: Where the body divides: whose first blocks' residual is among ``signals``.
    """

    branch: str
    step_index: int
    computed: bool
    residual: Tensor
    feature: Tensor | None
    signals: Mapping[str, Tensor]
    model_output: Tensor
    buffers: Mapping[str, Tensor]
    sections: Sections | None = None


@dataclass(frozen=True)
class OpenStep:
    """One step of one branch taken apart, for whoever fits what is reused; see `Session.open_step`.

    Attributes:
        hidden: [batch, tokens, channels], the body's input; the next opened step overwrites it.
    """

    hidden: Tensor
    _body: Body
    _finish: BoundCall
    _model_output: Tensor

    def compute(self) -> Tensor:
        """Run the body and return its residual."""
        self._body.run()
        return self._body.results[HIDDEN] - self.hidden

    def finish(self, residual: Tensor) -> Tensor:
        """Return the model output that a residual leads to, float32."""
        torch.add(self.hidden, residual, out=self._body.results[HIDDEN])
        self._finish.run()
        return self._model_output.clone()


class Recorder(Protocol):
    """Receives what a trace keeps."""

    wants_signals: bool
    across_experts: ClassVar[bool]  # whether it follows a run from one transformer to the next

    def on_run(self, tables: Mapping[str, Tensor], schedule: Schedule) -> None:
        """Take the tables [steps, …] that policies may look at, when a run begins."""

    def on_step(self, record: StepRecord, dims: Mapping[str, int]) -> None:
        """Take one step."""
