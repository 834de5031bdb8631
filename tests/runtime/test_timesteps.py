# SPDX-License-Identifier: Apache-2.0
"""What a model is given beside a step's own timestep follows from the run's."""

from __future__ import annotations

import torch

from freewheel.bundle.manifest import InputEntry
from freewheel.runtime.timesteps import timestep_inputs


def entry(**fields: object) -> InputEntry:
    shape = {"dtype": "float32", "shape": ["steps"], "argument": "timestep", "runs": "run"}
    return InputEntry.model_validate({**shape, **fields})


def test_the_next_steps_timestep_is_0_behind_the_last() -> None:
    inputs = {"timesteps": entry(), "next_timesteps": entry(argument="r", of=["next"])}
    given = timestep_inputs(inputs, torch.tensor([900.0, 500.0, 100.0]))
    assert {n: t.tolist() for n, t in given.items()} == {
        "timesteps": [900.0, 500.0, 100.0],
        "next_timesteps": [500.0, 100.0, 0.0],
    }


def test_timesteps_are_known_where_no_input_is_one() -> None:
    assert timestep_inputs({}, torch.tensor([3.0]))["timesteps"].tolist() == [3.0]


def test_a_vector_of_timesteps_has_each_steps_values_one_behind_another() -> None:
    inputs = {"step_timesteps": entry(of=["latents", "audio_latents"], indices="timestep_indices")}
    timesteps, audio = torch.tensor([0.9, 0.5]), torch.tensor([0.8, 0.2])
    given = timestep_inputs(inputs, timesteps, {"audio_latents": audio})
    assert torch.equal(given["step_timesteps"], torch.tensor([0.9, 0.8, 0.5, 0.2]))
    alone = timestep_inputs(inputs, timesteps)["step_timesteps"]
    assert torch.equal(alone, torch.tensor([0.9, 0.9, 0.5, 0.5]))
