# SPDX-License-Identifier: Apache-2.0
"""``--set key=value`` on a resolved setting."""

from __future__ import annotations

import pytest

from freewheel.configs.load import load_config
from freewheel.core.errors import ConfigError
from freewheel.policies import policy_class
from freewheel.policies.overrides import apply_overrides
from freewheel.policies.setting import CacheSetting


def override(policy: str, **texts: str) -> CacheSetting:
    return apply_overrides(load_config(policy).setting(), texts, policy_class(policy).spec)


def test_texts_are_typed_by_the_parameter() -> None:
    assert override("teacache", threshold="0.2").parameters == {"threshold": 0.2}
    assert override("teacache", threshold="1").parameters == {"threshold": 1}
    assert override("taylorseer", order="3", variant="newton").parameters == {
        "order": 3,
        "variant": "newton",
    }
    ada = override("adacache", codebook_skips="4,2", scale_codebook="true")
    assert ada.parameters == {"codebook_skips": [4, 2], "scale_codebook": True}
    tea = override("teacache", coefficients="[1e3, -2.5, 0]")
    assert tea.parameters == {"coefficients": [1e3, -2.5, 0]}


def test_guard_and_signal_may_be_set() -> None:
    setting = override(
        "teacache", first_exact="3", max_reused="9", exact_steps="4,7", signal="timestep_proj"
    )
    assert setting.signal == "timestep_proj"
    assert setting.guard.first_exact == 3
    assert setting.guard.max_reused == 9
    assert setting.guard.exact_steps == [4, 7]
    assert setting.guard.last_exact == 1


def test_setting_given_is_left_as_it_was() -> None:
    before = load_config("shapes_wan_teacache").setting()
    after = apply_overrides(before, {"threshold": "0.5"}, policy_class("teacache").spec)
    assert before.parameters["threshold"] == 0.25
    assert after.parameters == {**before.parameters, "threshold": 0.5}
    assert after.guard == before.guard


@pytest.mark.parametrize(
    ("policy", "key", "text", "message"),
    [
        ("teacache", "threshold", "high", "'threshold': expected a number, found 'high'"),
        ("teacache", "threshold", "-1", "-1 is outside"),
        ("teacache", "threshold", "true", "expected a number, found True"),
        ("teacache", "threshold", "NaN", "nan is outside"),
        ("teacache", "coefficients", "1,x", "expected a list of numbers"),
        ("teacache", "coefficients", "1,2,3,4,5,6,7", "has 7 values, at most 6"),
        ("teacache", "treshold", "1", "policy 'teacache' has none; did you mean 'threshold'"),
        ("teacache", "signal", "tem", "takes no 'tem'; did you mean 'temb'"),
        ("taylorseer", "signal", "temb", "takes no 'temb'; remove it"),
        ("taylorseer", "order", "2.0", "expected an integer, found 2.0"),
        ("taylorseer", "variant", "euler", "unknown choice 'euler'"),
        ("adacache", "scale_codebook", "1", "expected true or false, found 1"),
        ("off", "first_exact", "-2", "-2 is outside"),
        ("off", "exact_steps", "a", "expected step indices, found 'a'"),
        ("off", "exact_steps", "1,-1", "-1 is outside"),
        ("off", "exact_steps", '["1"]', "expected an integer, found '1'"),
    ],
)
def test_wrong_value_is_refused(policy: str, key: str, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        override(policy, **{key: text})
    assert message in str(caught.value)


def test_all_faults_come_in_one_error() -> None:
    with pytest.raises(ConfigError) as caught:
        override("taylorseer", order="9", interval="x", colour="red")
    assert caught.value.what.startswith("3 faults: ")
    assert all(part in caught.value.what for part in ("'order'", "'interval'", "'colour'"))
