"""Schedulers by name, and Euler over the steps of a distilled model."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch

from freewheel.bundle.sampler import SAMPLERS
from freewheel.core.errors import RequestError
from freewheel.runtime.pipeline.schedulers import StepListScheduler, make_scheduler


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_name_gives_its_scheduler_at_the_shift(name: str) -> None:
    scheduler = make_scheduler(name, 5.0)
    assert isinstance(scheduler, getattr(diffusers, SAMPLERS[name]))
    scheduler.set_timesteps(4)
    sigma = float(scheduler.sigmas[1])
    linear = sigma / (5 - 4 * sigma)  # 5 x / (1 + 4 x), solved for x
    assert 0.5 < linear < 0.9


@pytest.mark.parametrize("name", ["distilled", "steps_1000_750_500_250"])
def test_four_steps_are_those_of_a_distilled_model(name: str) -> None:
    """By the published formula: x of 1000 is shifted, and Euler goes from each level to the next."""
    levels = np.array([1.0, 0.75, 0.5, 0.25, 0.0])
    sigmas = 5 * levels / (1 + 4 * levels)
    scheduler = make_scheduler(name, 5.0)
    scheduler.set_timesteps(4)
    np.testing.assert_allclose(scheduler.timesteps, 1000 * sigmas[:4], rtol=1e-6)
    np.testing.assert_allclose(scheduler.sigmas, sigmas, rtol=1e-6)
    random = np.random.default_rng(0)
    sample = expected = random.standard_normal((1, 4, 2, 3, 3)).astype(np.float32)
    for index, timestep in enumerate(scheduler.timesteps):
        output = random.standard_normal(sample.shape).astype(np.float32)
        expected = expected - sigmas[index] * output + sigmas[index + 1] * output
        stepped = scheduler.step(torch.from_numpy(output), timestep, torch.from_numpy(sample))
        sample = stepped.prev_sample.numpy()
    np.testing.assert_allclose(sample, expected, rtol=1e-5, atol=1e-5)


def test_eight_steps_are_spread_evenly() -> None:
    scheduler = make_scheduler("distilled", 1.0)
    scheduler.set_timesteps(8)
    assert scheduler.timesteps.tolist() == [1000 - 125 * i for i in range(8)]


def test_a_run_of_another_length_than_the_list_is_refused() -> None:
    scheduler = make_scheduler("steps_1000_500", 5.0)
    with pytest.raises(RequestError, match=r"--steps 4: is not the 2 steps .*use --steps 2"):
        scheduler.set_timesteps(4)


def test_given_timesteps_are_refused() -> None:
    with pytest.raises(RequestError, match=r"sampler 'distilled': is given sigmas"):
        StepListScheduler().set_timesteps(4, sigmas=[1.0, 0.5])
