"""Names of samplers, those of lists of steps among them."""

from __future__ import annotations

import pytest

from freewheel.bundle.sampler import SAMPLERS, TABULATED, check_sampler, list_sampler, step_list
from freewheel.core.errors import RequestError


@pytest.mark.parametrize("steps", [[1000, 750, 500, 250], [1000.0, 908.8427, 713.9794], [74]])
def test_a_name_says_its_list(steps: list[float]) -> None:
    name = list_sampler(steps)
    assert step_list(name) == tuple(steps)
    check_sampler(name)


def test_a_list_of_whole_numbers_is_written_as_such() -> None:
    assert list_sampler([1000.0, 750]) == "steps_1000_750"


@pytest.mark.parametrize("name", ["steps", "steps_", "steps_a", "steps_1000_", "euler", "steps_-1"])
def test_other_names_list_nothing(name: str) -> None:
    assert step_list(name) is None


def test_an_unknown_sampler_is_refused_with_the_nearest() -> None:
    with pytest.raises(RequestError, match=r"--sampler eular: is not known.*'euler'"):
        check_sampler("eular")
    for name in SAMPLERS:
        check_sampler(name)
    assert set(TABULATED) == SAMPLERS.keys() - {"lcm"}
