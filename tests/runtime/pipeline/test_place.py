# SPDX-License-Identifier: Apache-2.0
"""Which step and branch of a run a call is, told from its timestep, its prompt and its context."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from freewheel.bundle.manifest import InputEntry
from freewheel.core.errors import RequestError
from freewheel.runtime.pipeline.place import RunPlace, calling_pipeline

TIMESTEPS = (900.0, 600.0, 300.0)
CAT, DOG = ({"text": torch.full((1, 2), value)} for value in (1.0, 2.0))


def entry(*of: str) -> InputEntry:
    return InputEntry(
        dtype="float32", shape=[len(of)], argument="timestep", runs="run", of=list(of)
    )


def place(*, takes_over: bool = False) -> RunPlace:
    return RunPlace(entry("latents"), takes_over=takes_over)


def pipeline(timesteps: tuple[float, ...] = TIMESTEPS, **others: Any) -> Any:
    scheduler = SimpleNamespace(timesteps=torch.tensor(timesteps))
    return SimpleNamespace(scheduler=scheduler, **others)


def at(*timesteps: float) -> Tensor:
    return torch.tensor(timesteps, dtype=torch.float32)


def everywhere(timesteps: Tensor) -> Tensor:
    return torch.ones_like(timesteps, dtype=torch.bool)


def test_calls_without_a_context_are_branches_by_their_prompts() -> None:
    found, pipe = place(), pipeline()
    assert found.find(pipe.scheduler, CAT, at(900)) is None, "a run has to begin"
    begun = found.begin(pipe, at(900), everywhere)
    assert begun.timesteps.tolist() == list(TIMESTEPS)
    assert (begun.sigmas, begun.beside) == (None, {})
    assert found.branch(CAT, at(900)) == "cond"
    found.end_step("cond", 0)
    for timestep, prompt, expected in [
        (900, DOG, ("uncond", 0)),
        (600, CAT, ("cond", 1)),
        (600, DOG, ("uncond", 1)),
        (300, CAT, ("cond", 2)),
        (300, DOG, ("uncond", 2)),
    ]:
        assert found.find(pipe.scheduler, prompt, at(timestep)) == expected
        found.end_step(*expected)
    assert found.find(pipe.scheduler, CAT, at(900)) is None, "the next run"
    assert found.done == {"cond": 2, "uncond": 2}


def test_a_context_names_the_branch_and_holds_the_step_to_its_count() -> None:
    found, pipe = place(), pipeline()
    found.context = {"name": "positive", "step_index": 0}
    found.begin(pipe, at(900), everywhere)
    found.end_step(found.branch(CAT, at(900)), 0)
    found.context = {"name": "positive", "step_index": 1}
    assert found.find(pipe.scheduler, CAT, at(600)) == ("positive", 1)
    found.context = {"name": "positive", "step_index": 2}
    with pytest.raises(RequestError, match=r"timestep 600: can't be placed"):
        found.find(pipe.scheduler, CAT, at(600))


def test_a_run_begins_late_where_its_first_call_does_and_only_there() -> None:
    found, pipe = place(), pipeline()
    assert found.begin(pipe, at(600), everywhere).timesteps.tolist() == [600, 300]
    with pytest.raises(RequestError, match=r"timestep 450: can't be placed"):
        found.begin(pipe, at(450), everywhere)
    pipe.scheduler.timesteps = torch.tensor(TIMESTEPS)  # set anew: another run
    assert found.find(pipe.scheduler, CAT, at(300)) is None


def test_an_expert_runs_its_own_timesteps_and_takes_over_the_count() -> None:
    found, pipe = place(takes_over=True), pipeline()
    pipe.scheduler.sigmas = torch.tensor([0.9, 0.6, 0.3, 0.0])
    found.context = {"name": "cond", "step_index": 1}
    begun = found.begin(pipe, at(600), lambda timesteps: timesteps < 700)
    assert begun.timesteps.tolist() == [600, 300]
    assert begun.sigmas is not None
    assert begun.sigmas.tolist() == pytest.approx([0.6, 0.3])
    found.end_step("cond", 0)
    found.context = {"name": "cond", "step_index": 2}
    assert found.find(pipe.scheduler, CAT, at(300)) == ("cond", 1)
    first = place()
    first.context = {"name": "cond", "step_index": 1}
    with pytest.raises(RequestError, match="can't be placed"):
        first.begin(pipe, at(600), everywhere)


def test_a_vector_of_timesteps_is_of_each_latents_own_scheduler() -> None:
    found = RunPlace(entry("latents", "audio_latents"), takes_over=False)
    audio = SimpleNamespace(timesteps=at(800, 500, 200))
    pipe = pipeline(audio_scheduler=audio)
    begun = found.begin(pipe, at(800, 900), everywhere)
    assert begun.beside["audio_latents"].tolist() == [800, 500, 200]
    assert found.own_indices(0, at(800, 900)).tolist() == [1, 0]
    with pytest.raises(RequestError, match="can't be placed"):
        found.begin(pipe, at(900, 500), everywhere)
    with pytest.raises(RequestError, match="'audio_scheduler': is missing"):
        found.begin(pipeline(), at(800, 900), everywhere)


def test_a_timestep_that_was_divided_and_multiplied_is_the_same() -> None:
    found = place()
    for timestep in torch.linspace(1, 1000, 777):
        assert found.is_at(timestep, (timestep / 1000)[None] * 1000)
        assert not found.is_at(timestep, timestep[None] * (1 + 1e-4))


def test_without_a_calling_pipeline_it_is_the_one_attached_to() -> None:
    attached_to = pipeline()
    assert calling_pipeline(attached_to) is attached_to
    with pytest.raises(RequestError, match="is called by no pipeline"):
        calling_pipeline(None)
