# SPDX-License-Identifier: Apache-2.0
"""Compiled policies against their laws, with compiled policies made of the laws themselves."""

from __future__ import annotations

import pytest
import torch

from freewheel.compiler.verify.policies import (
    TIE,
    check_policy,
    disagreement,
    nudged,
    random_settings,
)
from freewheel.policies import POLICIES, policy, policy_class
from freewheel.policies.deadline import Pace
from freewheel.policies.guard import Guarded
from freewheel.policies.setting import GUARD_PARAMETERS, CacheSetting
from freewheel.policies.spec import GUARD_STATE


def compiled(name: str, **changes):
    """Return the law itself as a compiled graph, with parameters or outputs changed."""
    law = Guarded(policy(name))

    def decide(inputs):
        changed = {n: changes.get(n, lambda t: t)(t) for n, t in inputs.items()}
        outputs = law(changed)
        return {n: changes.get(n, lambda t: t)(t) for n, t in outputs.items()}

    return decide


@pytest.mark.parametrize("name", POLICIES)
def test_random_settings_lie_in_range_and_start_with_the_defaults(name: str) -> None:
    spec = policy_class(name).spec
    settings = random_settings(spec)
    assert settings[0] == CacheSetting(policy=name)
    assert settings == random_settings(spec)
    for setting in settings:
        assert spec.resolve(setting.parameters).keys() == spec.parameters.keys()


@pytest.mark.parametrize("name", POLICIES)
def test_a_law_agrees_with_itself_and_is_seen_to_reuse(name: str) -> None:
    spec = policy_class(name).spec
    check = check_policy(spec, compiled(name), random_settings(spec), form="law")
    assert check.ok
    assert check.mix_error == 0
    assert check.decisions == sum((24, 9)[i % 2] for i in range(check.settings))
    assert (check.reused > 10) == (name != "off")


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("teacache", {"param.threshold": lambda t: t * 1.2}, "graph says reuse"),
        ("custom", {"mix": lambda t: t * 1.001}, "mix is"),
        ("taylorseer", {"param.order": torch.ones_like}, "mix is"),
        ("adacache", {"new_state.skip": lambda t: t + 1}, "'new_state.skip' is"),
        ("teacache", {"new_guard_state.reused": lambda t: t + 1}, "'new_guard_state.reused'"),
        ("teacache", {"new_state.distance": lambda t: t * float("nan")}, "'new_state.distance'"),
    ],
)
def test_each_kind_of_difference_is_told(name, changes, said) -> None:
    spec = policy_class(name).spec
    check = check_policy(spec, compiled(name, **changes), random_settings(spec), form="law")
    assert not check.ok
    assert any(said in fault and f"policy '{name}' with" in fault for fault in check.faults)


def test_only_a_difference_at_the_threshold_is_a_tie() -> None:
    law = Guarded(policy("teacache"))

    def is_tie(change: float, moved: float) -> bool:
        """Whether a law whose threshold is off by ``moved`` may differ at this distance."""
        inputs = {
            "step_index": torch.tensor(2),
            "step_count": torch.tensor(9),
            "exact": torch.tensor(False),
            **{f"guard.{n}": torch.tensor(0) for n in GUARD_PARAMETERS},
            **{f"guard_state.{n}": torch.tensor(0) for n in GUARD_STATE},
            "computed_steps": torch.tensor([1]),
            "timestep": torch.tensor(700.0),
            "sigma": torch.tensor(0.7),
            "computed_timesteps": torch.tensor([900.0]),
            "computed_sigmas": torch.tensor([0.9]),
            **{name: torch.tensor(value) for name, value in Pace()._asdict().items()},
            "signal": torch.full((1, 2), 1 + change),
            "previous_signal": torch.ones(1, 2),
            "param.threshold": torch.tensor(0.25),
            "param.coefficients": torch.tensor([0, 0, 0, 0, 1.0, 0]),
            "state.distance": torch.tensor(0.0),
        }
        expected = law(inputs)
        found = law({**inputs, "param.threshold": inputs["param.threshold"] * (1 + moved)})
        assert disagreement(expected, found, 1e-6) == "law says compute, graph says reuse"
        return any(disagreement(law(v), found, 1e-6) is None for v in nudged(inputs))

    assert is_tie(0.25, TIE / 2)
    assert not is_tie(0.2505, 0.01)
