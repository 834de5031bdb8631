# SPDX-License-Identifier: Apache-2.0
"""The signal of a branch's current step and those of its past: buffers stay, their roles move."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product

from torch import Tensor

__all__ = ["ROLES", "SignalBuffers"]

ROLES = ("previous_signal", "computed_signal")
"""Signals of the past: of the last step, and of the last computed step."""


class SignalBuffers:
    """One buffer for this step's signal and one more for each role of the past that is kept.

    The signal of a step is written once. At the next step its buffer becomes the previous one's, and
    the computed one's if the step was computed; a buffer without a role takes what comes next.

    Attributes:
        stand: Buffer of this step's signal, then of each role in the order of `ROLES`; -1 where a
            role is not kept.
    """

    def __init__(
        self,
        kept: Sequence[str],
        buffers: Sequence[Tensor],
        fill: Sequence[Callable[[int], object]],
    ) -> None:
        """Take buffers and what fills them.

        Args:
            kept: Roles that the policy keeps.
            buffers: float32 [rows, width], ``1 + len(kept)`` of them.
            fill: Per buffer, writes the signal of the step it is given.
        """
        assert len(buffers) == len(fill) == 1 + len(kept), "one for now, one for each role"
        self._kept, self._buffers, self._fill = [role in kept for role in ROLES], buffers, fill
        self.reset()

    def reset(self) -> None:
        """Forget every signal."""
        last = len(self._buffers) - 1
        self.stand: tuple[int, ...] = (last, *(last if kept else -1 for kept in self._kept))
        for buffer in self._buffers:
            buffer.zero_()

    def advance(self, step_index: int) -> None:
        """Move on to a step: write its signal where nothing that is kept stands."""
        before, _, computed = self.stand
        previous = before if self._kept[0] else -1
        taken = {previous, computed}
        current = next(i for i in range(len(self._buffers)) if i not in taken)
        self.stand = (current, previous, computed)
        self._fill[current](step_index)

    def mark_computed(self) -> None:
        """Note that this step is computed."""
        if self._kept[1]:
            self.stand = (*self.stand[:2], self.stand[0])

    def arrangements(self) -> Iterator[tuple[tuple[int, ...], dict[str, Tensor]]]:
        """Yield each way to stand at a decision, with the buffers by name."""
        spots = range(len(self._buffers))
        pasts = product(*(spots if kept else (-1,) for kept in self._kept))
        for current, past in product(spots, pasts):
            if current in past:
                continue
            named = zip(("signal", *ROLES), (current, *past), strict=True)
            yield (current, *past), {n: self._buffers[i] for n, i in named if i >= 0}
