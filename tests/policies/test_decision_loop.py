# SPDX-License-Identifier: Apache-2.0
"""The driver keeps for a decide function what a session keeps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from runs import fold, random_run
from settings import SETTINGS

from freewheel.core.errors import ConfigError
from freewheel.policies import policy_class
from freewheel.policies.decision_loop import DecisionLoop, initial_tensors, parameter_tensors
from freewheel.policies.guard import decide_inputs
from freewheel.policies.schedule import Schedule
from freewheel.policies.setting import CacheSetting, GuardSetting


class Recorder:
    """A decide function that answers from a list and remembers what it was given."""

    def __init__(self, name: str, computes: list[bool]) -> None:
        self.spec, self.computes, self.seen = policy_class(name).spec, computes, []

    def __call__(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        self.seen.append({n: t.clone() for n, t in inputs.items()})
        answer = {
            f"new_{n}": t + 1 for n, t in inputs.items() if "state." in n and t.dtype != torch.bool
        }
        answer |= {
            f"new_{n}": t for n, t in inputs.items() if "state." in n and t.dtype == torch.bool
        }
        answer["compute"] = torch.tensor(self.computes[len(self.seen) - 1])
        answer["mix"] = torch.ones(self.spec.history.maximum)
        return answer


def constant(value: float, *shape: int) -> np.ndarray:
    return np.full(shape, value, np.float32)


def test_previous_signal_is_that_of_the_step_before_computed_or_not() -> None:
    decide = Recorder("teacache", [True, False, False, True])
    law = DecisionLoop(decide.spec, decide, CacheSetting(policy="teacache"), step_count=4)
    for t in range(4):
        law.decide(constant(t + 1, 1, 2))
    assert [s["signal"][0, 0].item() for s in decide.seen] == [1, 2, 3, 4]
    assert [s["previous_signal"][0, 0].item() for s in decide.seen] == [0, 1, 2, 3]


def test_features_are_those_of_the_last_two_computed_steps() -> None:
    decide = Recorder("adacache", [True, True, False, True, False])
    law = DecisionLoop(decide.spec, decide, CacheSetting(policy="adacache"), step_count=5)
    for _ in range(5):
        last = law.last_computed
        law.decide(feature=None if last is None else constant(last + 1, 2, 3, 4))
    pairs = [(s["feature"].max().item(), s["previous_feature"].max().item()) for s in decide.seen]
    assert pairs == [(0, 0), (1, 0), (2, 1), (2, 1), (4, 2)]


def test_computed_steps_are_those_of_the_residuals_kept() -> None:
    decide = Recorder("taylorseer", [True, True, False, True, True])
    law = DecisionLoop(decide.spec, decide, CacheSetting(policy="taylorseer"), step_count=5)
    for _ in range(5):
        law.decide()
    expected = [[-1, -1], [0, -1], [1, 0], [1, 0], [3, 1]]
    assert [s["computed_steps"].tolist() for s in decide.seen] == [e + [-1] * 3 for e in expected]


def test_schedule_is_that_of_the_step_and_of_the_residuals_kept() -> None:
    decide = Recorder("custom", [True, False, True, True])
    schedule = Schedule.of([900.0, 800.0, 700.0, 600.0], [4.0, 3.0, 2.0, 1.0])
    setting = CacheSetting(policy="custom")
    law = DecisionLoop(decide.spec, decide, setting, step_count=4, schedule=schedule)
    for _ in range(4):
        law.decide(constant(1, 1, 2))
    seen = [(s["timestep"].item(), s["sigma"].item()) for s in decide.seen]
    assert seen == [(900, 4), (800, 3), (700, 2), (600, 1)]
    past = [s["computed_timesteps"].tolist() for s in decide.seen]
    assert past == [[0, 0], [900, 0], [900, 0], [700, 900]]
    assert [s["computed_sigmas"].tolist() for s in decide.seen] == [[0, 0], [4, 0], [4, 0], [2, 4]]


def test_without_a_schedule_noise_falls_evenly() -> None:
    decide = Recorder("teacache", [True] * 4)
    law = DecisionLoop(decide.spec, decide, CacheSetting(policy="teacache"), step_count=4)
    for _ in range(4):
        law.decide(constant(1, 1, 2))
    assert [s["sigma"].item() for s in decide.seen] == [1, 0.75, 0.5, 0.25]
    assert [s["timestep"].item() for s in decide.seen] == [1000, 750, 500, 250]


def test_state_and_mask_are_fed_back() -> None:
    decide = Recorder("adacache", [True, False, True])
    setting = CacheSetting(policy="adacache", guard=GuardSetting(exact_steps=[2], last_exact=1))
    law = DecisionLoop(decide.spec, decide, setting, step_count=3)
    for _ in range(3):
        law.decide(feature=constant(1, 1, 1, 1))
    assert [s["state.skip"].item() for s in decide.seen] == [1, 2, 3]
    assert [s["exact"].item() for s in decide.seen] == [False, False, True]
    assert decide.seen[0]["guard.last_exact"].item() == 1
    assert set(decide.seen[0]) == set(decide_inputs(decide.spec))


@pytest.mark.parametrize("name", SETTINGS)
def test_reset_forgets_the_run_before(name: str) -> None:
    run, other = random_run(1, 25), random_run(2, 25)
    law = DecisionLoop.eager(SETTINGS[name], step_count=25)
    fresh = fold(law, run)
    law.reset()
    fold(law, other)
    law.reset()
    assert fold(law, run) == fresh


def test_two_branches_do_not_share_state() -> None:
    run, other = random_run(1, 25), random_run(2, 25)
    setting = SETTINGS["tea"]
    alone = fold(DecisionLoop.eager(setting, step_count=25), run)
    cond, uncond = (DecisionLoop.eager(setting, step_count=25) for _ in range(2))
    together = []
    for t in range(25):
        together.append(cond.decide(run["signal"][t]))
        uncond.decide(other["signal"][t])
    assert together == alone


def test_wrong_parameters_are_refused() -> None:
    for parameters, message in (
        ({"threshold": "high"}, "parameter 'threshold': expected a number, found 'high'"),
        ({"threshold": -1.0}, "parameter 'threshold': -1.0 is outside"),
        ({"treshold": 0.1}, "is not known; did you mean 'threshold'"),
    ):
        with pytest.raises(ConfigError, match=message):
            DecisionLoop.eager(CacheSetting(policy="teacache", parameters=parameters), step_count=3)
    with pytest.raises(
        ConfigError, match=r"signal 'latents': can't be given to policy '[a-z]+'; .*temb"
    ):
        DecisionLoop.eager(CacheSetting(policy="teacache", signal="latents"), step_count=3)


def test_tensors_have_the_declared_dtype_shape_and_padding() -> None:
    tensors = parameter_tensors(
        policy_class("teacache").spec.parameters, {"coefficients": [2.0, 3.0]}
    )
    assert tensors["coefficients"].tolist() == [0, 0, 0, 0, 2, 3]
    assert tensors["threshold"].shape == ()
    skips = parameter_tensors(policy_class("adacache").spec.parameters, {})["codebook_skips"]
    assert skips.tolist() == [12, 10, 8, 6, 4, 3, 3, 3]
    assert skips.dtype == torch.int64
    state = initial_tensors(policy_class("adacache").spec.state)
    assert {n: t.item() for n, t in state.items()} == {
        "skip": 1,
        "moreg": 1.0,
        "has_feature": False,
    }
