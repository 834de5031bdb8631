# SPDX-License-Identifier: Apache-2.0
"""Buffers of signals stay where they are; what they stand for moves."""

from __future__ import annotations

import pytest
import torch

from freewheel.runtime.signals import SignalBuffers


def buffers(*kept: str) -> tuple[SignalBuffers, list[torch.Tensor]]:
    """Return buffers into which the signal of step t is written as t + 1."""
    tensors = [torch.zeros(1, 2) for _ in range(1 + len(kept))]
    fill = [lambda t, b=b: b.fill_(t + 1.0) for b in tensors]
    return SignalBuffers(kept, tensors, fill), tensors


def seen(signals: SignalBuffers) -> dict[str, float]:
    """Return what a policy would be shown now, by name."""
    named = dict(signals.arrangements())[signals.stand]
    return {name: float(tensor[0, 0]) for name, tensor in named.items()}


@pytest.mark.parametrize(
    "kept",
    [
        (),
        ("previous_signal",),
        ("computed_signal",),
        ("previous_signal", "computed_signal"),
        ("computed_signal", "older_signal"),
        ("previous_signal", "computed_signal", "older_signal"),
    ],
)
def test_each_role_shows_the_signal_of_its_step(kept: tuple[str, ...]) -> None:
    signals, tensors = buffers(*kept)
    last_computed = older = 0.0
    for step in range(12):
        signals.advance(step)
        expected = {"signal": step + 1.0}
        if "previous_signal" in kept:
            expected["previous_signal"] = float(step)
        if "computed_signal" in kept:
            expected["computed_signal"] = last_computed
        if "older_signal" in kept:
            expected["older_signal"] = older
        assert seen(signals) == expected
        if step % 3 == 0 or step == 7:
            signals.mark_computed()
            older, last_computed = last_computed, step + 1.0
    signals.reset()
    assert all(not bool(t.any()) for t in tensors)


def test_no_arrangement_shows_one_buffer_as_now_and_as_past() -> None:
    signals, _ = buffers("previous_signal", "computed_signal")
    found = list(signals.arrangements())
    assert len(found) == len({stand for stand, _ in found}) == 9
    for _, named in found:
        assert named["signal"] is not named["previous_signal"]
        assert named["signal"] is not named["computed_signal"]


def test_of_four_buffers_only_ways_that_a_run_can_stand_are_bound() -> None:
    signals, _ = buffers("previous_signal", "computed_signal", "older_signal")
    found = {stand for stand, _ in signals.arrangements()}
    assert {s for s in found if len(set(s[2:])) == 2} >= {(0, 1, 2, 3), (0, 2, 2, 3)}
    assert len(found) <= 64
    assert all(stand[0] not in stand[1:] for stand in found)
