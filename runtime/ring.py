# SPDX-License-Identifier: Apache-2.0
"""The residual history of one branch: a ring in one device buffer a stream that is never shifted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..engines.base import ALIGNMENT

__all__ = ["ResidualRing"]


class ResidualRing:
    """The last K residuals of one branch.

    ``delta`` writes the next residual straight into the oldest slot, by binding that slot's
    address; what moves is the index of the newest slot. A history is bound whole to ``reuse``,
    and ``mix`` is permuted to follow the slots. All streams move together.

    Slots lie side by side, since a history is one tensor. Where a residual's bytes are no multiple
    of `ALIGNMENT`, which no model of real width has, ``delta`` writes beside the ring and `push`
    copies.

    Attributes:
        history: Stream → [slots, batch, tokens, channels], on the engines' device.
        mix: float32 [slots], bound to ``reuse``.
        computed_steps: Step index of each residual held, newest first.
    """

    def __init__(
        self,
        slots: int,
        shapes: Mapping[str, Sequence[int]],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.slots = slots
        self.history = {
            stream: torch.zeros((slots, *shape), dtype=dtype, device=device)
            for stream, shape in shapes.items()
        }
        self.mix = torch.zeros(slots, dtype=torch.float32, device=device)
        self._host_mix = torch.zeros(slots, dtype=torch.float32)
        self.computed_steps: list[int] = []
        self._newest = -1
        self._beside = {
            stream: torch.zeros_like(history[0])
            for stream, history in self.history.items()
            if slots > 1 and history[0].nbytes % ALIGNMENT
        }

    def reset(self) -> None:
        """Forget everything; zeros, since 0 · NaN of an old run would be NaN."""
        for history in self.history.values():
            history.zero_()
        self.computed_steps.clear()
        self._newest = -1

    @property
    def next_slot(self) -> int:
        """Slot that the next residual goes to."""
        return (self._newest + 1) % self.slots

    def slot(self, index: int) -> dict[str, Tensor]:
        """Return where the residual of a slot is written: stream → [batch, tokens, channels]."""
        return {s: self._beside.get(s, history[index]) for s, history in self.history.items()}

    def push(self, step_index: int) -> None:
        """Record that the residual of ``step_index`` was written to ``next_slot``."""
        self._newest = self.next_slot
        for stream, residual in self._beside.items():
            self.history[stream][self._newest].copy_(residual)
        self.computed_steps.insert(0, step_index)
        del self.computed_steps[self.slots :]

    def differences(self) -> Tensor:
        """Return the factors of slots that make what ``gram`` multiplies, float32 [slots, slots].

        Row 0 is the newest residual, row k that of age k − 1 minus that of age k; rows of zeros
        stand for what is not held.
        """
        factors = torch.zeros(self.slots, self.slots)
        for age in range(len(self.computed_steps)):
            slot = (self._newest - age) % self.slots
            factors[age, slot] = -1.0 if age else 1.0
            if age + 1 < len(self.computed_steps):
                factors[age + 1, slot] = 1.0
        return factors

    def set_mix(self, mix: Sequence[float]) -> None:
        """Set the factors of the next reuse, given newest first."""
        self._host_mix.zero_()
        for age in range(min(len(self.computed_steps), len(mix))):
            self._host_mix[(self._newest - age) % self.slots] = mix[age]
        self.mix.copy_(self._host_mix)
