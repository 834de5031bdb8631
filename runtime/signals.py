# SPDX-License-Identifier: Apache-2.0
"""The signal of a branch's current step and those of its past: buffers stay, their roles move."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

__all__ = ["ROLES", "SignalBuffers"]

ROLES = ("previous_signal", "computed_signal", "older_signal")
"""Signals of the past: of the last step, of the last computed step, of the computed step before."""

Stand = tuple[int, ...]
"""Buffer of this step's signal, then of each role in the order of `ROLES`; -1 where it is not kept."""


class SignalBuffers:
    """One buffer for this step's signal and one more for each role of the past that is kept.

    The signal of a step is written once. At the next step its buffer becomes the previous one's, and
    the computed one's if the step was computed, whose buffer becomes the older one's then; a buffer
    without a role takes what comes next.

    Attributes:
        stand: Which buffer is which now.
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
        self.stand = self._first()
        for buffer in self._buffers:
            buffer.zero_()

    def advance(self, step_index: int) -> None:
        """Move on to a step: write its signal where nothing that is kept stands."""
        self.stand = self._advanced(self.stand)
        self._fill[self.stand[0]](step_index)

    def mark_computed(self) -> None:
        """Note that this step is computed."""
        self.stand = self._computed(self.stand)

    def arrangements(self) -> Iterator[tuple[Stand, dict[str, Tensor]]]:
        """Yield each way to stand at a decision, with the buffers by name."""
        found: set[Stand] = set()
        left = [self._first()]
        while left:
            stand = self._advanced(left.pop())
            if stand in found:
                continue
            found.add(stand)
            left += [stand, self._computed(stand)]
            named = zip(("signal", *ROLES), stand, strict=True)
            yield stand, {name: self._buffers[i] for name, i in named if i >= 0}

    def _first(self) -> Stand:
        last = len(self._buffers) - 1
        return (last, *(last if kept else -1 for kept in self._kept))

    def _advanced(self, stand: Stand) -> Stand:
        current, _, *computed = stand
        past = (current if self._kept[0] else -1, *computed)
        return (next(i for i in range(len(self._buffers)) if i not in past), *past)

    def _computed(self, stand: Stand) -> Stand:
        current, previous, computed, _ = stand
        moved = (current if self._kept[1] else -1, computed if self._kept[2] else -1)
        return (current, previous, *moved)
