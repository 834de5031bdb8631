# SPDX-License-Identifier: Apache-2.0
"""Guidance that the model embeds asks for one branch; true guidance beside it for two."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from freewheel.bundle.guidance import branch_count, embeds_guidance

PLAIN = [SimpleNamespace(argument="hidden_states"), SimpleNamespace(argument="timestep")]
EMBEDDING = [*PLAIN, SimpleNamespace(argument="guidance")]


def test_the_input_tells() -> None:
    assert embeds_guidance(EMBEDDING)
    assert not embeds_guidance(PLAIN)


@pytest.mark.parametrize(
    ("inputs", "scale", "true_scale", "branches"),
    [
        (PLAIN, 5.0, 1.0, 2),
        (PLAIN, 1.0, 1.0, 1),
        (EMBEDDING, 3.5, 1.0, 1),
        (EMBEDDING, 1.0, 4.0, 2),
    ],
)
def test_branches_are_counted(inputs: list, scale: float, true_scale: float, branches: int) -> None:
    assert branch_count(inputs, scale, true_scale) == branches
