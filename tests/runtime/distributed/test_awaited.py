# SPDX-License-Identifier: Apache-2.0
"""A promised tensor is fetched by the first operation on its values, once, and by no view."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from freewheel.runtime.distributed.awaited import Awaited


class Arrival:
    """Fills a buffer with 2 and counts how often it is asked to."""

    def __init__(self) -> None:
        self.buffer, self.asked = torch.zeros(2, 4, 3), 0

    def __call__(self) -> None:
        self.asked += 1
        self.buffer.fill_(2.0)


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t[:, :2],
        lambda t: t.chunk(2)[1],
        lambda t: t.unsqueeze(0),
        lambda t: t.view(-1),
        lambda t: t.transpose(0, 1),
        lambda t: t.detach(),
        lambda t: t.float(),
    ],
)
def test_views_and_shapes_fetch_nothing(view: Callable[[Tensor], Tensor]) -> None:
    arrival = Arrival()
    seen = view(Awaited(arrival.buffer, arrival))
    assert arrival.asked == 0
    assert seen.shape == view(arrival.buffer).shape
    assert bool((seen + 0 == 2).all())
    assert arrival.asked == 1


@pytest.mark.parametrize(
    "read",
    [
        lambda t: t * 2 - t,
        lambda t: torch.ones(2, 4, 3) + t - 1,
        lambda t: t.clone(),
        lambda t: t.to(torch.float64),
        lambda t: torch.where(t > 1, t, t),
        lambda t: t.add_(0),
    ],
)
def test_values_are_fetched_before_they_are_read(read: Callable[[Tensor], Tensor]) -> None:
    arrival = Arrival()
    found = read(Awaited(arrival.buffer, arrival))
    assert arrival.asked > 0
    assert bool((found == 2).all())


def test_guidance_of_two_promises_is_what_plain_tensors_give() -> None:
    first, second = Arrival(), Arrival()
    cond, uncond = (Awaited(a.buffer, a) for a in (first, second))
    found = uncond + 3.0 * (cond[:, :4] - uncond)
    assert bool((found == 2).all())


def test_what_can_not_be_fetched_is_refused_not_read() -> None:
    arrival = Arrival()
    with pytest.raises(RuntimeError, match="not supported for tensor subclasses"):
        Awaited(arrival.buffer, arrival).numpy()


def test_showing_it_fetches_it() -> None:
    arrival = Arrival()
    assert "2." in repr(Awaited(arrival.buffer, arrival))
