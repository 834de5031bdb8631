"""The ring against a plain list of the newest residuals, whatever is pushed and however often."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from freewheel.runtime.ring import ResidualRing

SHAPE = (1, 2, 3)


def ring_of(slots: int) -> ResidualRing:
    return ResidualRing(slots, {"hidden": SHAPE}, torch.float32, torch.device("cpu"))


def write(ring: ResidualRing, step: int) -> torch.Tensor:
    """Do as `delta` does: write into the next slot by its address, then tell the ring."""
    residual = torch.full(SHAPE, float(step + 1))
    ring.slot(ring.next_slot)["hidden"].copy_(residual)
    ring.push(step)
    return residual


@given(
    slots=st.integers(1, 5),
    steps=st.lists(st.integers(0, 40), min_size=1, max_size=12, unique=True),
    mix=st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=5),
)
def test_mix_meets_the_residual_of_its_age(slots: int, steps: list[int], mix: list[float]) -> None:
    ring = ring_of(slots)
    written = [write(ring, step) for step in steps]
    newest_first = written[::-1][:slots]
    assert ring.computed_steps == steps[::-1][:slots]
    ring.set_mix(mix)
    expected = sum((m * r for m, r in zip(mix, newest_first, strict=False)), torch.zeros(SHAPE))
    found = torch.tensordot(ring.mix, ring.history["hidden"], dims=1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def test_nothing_is_shifted_or_allocated_anew() -> None:
    ring = ring_of(3)
    address, mix = ring.history["hidden"].data_ptr(), ring.mix.data_ptr()
    for step in range(7):
        before = ring.history["hidden"].clone()
        slot = ring.next_slot
        write(ring, step)
        kept = [i for i in range(3) if i != slot]
        torch.testing.assert_close(ring.history["hidden"][kept], before[kept], rtol=0, atol=0)
        ring.set_mix([2.0, -1.0])
    assert (ring.history["hidden"].data_ptr(), ring.mix.data_ptr()) == (address, mix)


def test_reset_forgets_values_that_are_not_numbers() -> None:
    ring = ring_of(2)
    ring.slot(ring.next_slot)["hidden"].fill_(float("nan"))
    ring.push(0)
    ring.reset()
    assert ring.computed_steps == []
    write(ring, 4)
    ring.set_mix([1.0, 0.0])
    assert torch.tensordot(ring.mix, ring.history["hidden"], dims=1).isfinite().all()


def test_factors_of_residuals_that_are_not_there_count_for_nothing() -> None:
    ring = ring_of(3)
    write(ring, 0)
    ring.set_mix([1.0, 5.0, 7.0])
    assert ring.mix.sum() == 1.0


@pytest.mark.parametrize(("tokens", "dtype"), [(5, "float16"), (8, "float16"), (7, "float32")])
def test_delta_writes_where_engines_take_an_address(
    tokens: int, dtype: str, host_device: object
) -> None:
    """Allocations of the feigned device are aligned as a GPU's are; slots need not be."""
    shape, kind = (1, tokens, 16), getattr(torch, dtype)
    ring = ResidualRing(3, {"hidden": shape}, kind, torch.device("cpu"))
    for step in range(5):
        slot = ring.slot(ring.next_slot)["hidden"]
        assert slot.data_ptr() % 256 == 0
        slot.fill_(float(step))
        ring.push(step)
    ring.set_mix([1.0, 10.0, 100.0])
    mixed = torch.tensordot(ring.mix, ring.history["hidden"].float(), dims=1)
    assert torch.equal(mixed, torch.full(shape, 4.0 + 30.0 + 200.0))


def test_differences_follow_the_slots_as_the_ring_turns() -> None:
    ring = ResidualRing(3, {"hidden": (1, 2, 4)}, torch.float32, torch.device("cpu"))
    assert ring.differences().abs().sum() == 0
    values = torch.tensor([3.0, 5.0, 10.0, 20.0])
    expected = [[3, 0, 0], [5, 5 - 3, 0], [10, 10 - 5, 5 - 3], [20, 20 - 10, 10 - 5]]
    for step, wanted in enumerate(expected):
        ring.slot(ring.next_slot)["hidden"].fill_(float(values[step]))
        ring.push(step)
        made = ring.differences() @ ring.history["hidden"].flatten(1)[:, 0]
        assert made.tolist() == wanted
