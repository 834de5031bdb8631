# SPDX-License-Identifier: Apache-2.0
"""A pair takes one policy's decisions and another one's mix, whole and nothing else."""

from __future__ import annotations

from itertools import product

import pytest
from runs import assert_equals_reference, fold, random_run
from settings import FAST, NEUTRAL

from freewheel.configs.load import load_config, parse_config
from freewheel.core.errors import ConfigError
from freewheel.policies import HOLDING, POLICIES, form_of, mixes, policy_class
from freewheel.policies.base import Decision
from freewheel.policies.catalogue import describe_policies, render
from freewheel.policies.decision_loop import DecisionLoop
from freewheel.policies.guard import Guarded
from freewheel.policies.pairs import pair_of
from freewheel.policies.setting import CacheSetting

MIXES = list(mixes())
LOOSE = {
    "teacache": {"threshold": 0.4},
    "adacache": {**FAST, **NEUTRAL},
    "firstblock": {"threshold": 0.2},
    "easycache": {"threshold": 0.4},
    "seacache": {"threshold": 0.4},
    "dicache": {"threshold": 0.3},
    "dbcache": {"threshold": 0.2},
    "dualblock": {"threshold": 0.08},
    "sencache": {"threshold": 0.8, "early": 0.0},
    "solved": {"computed_steps": 1, "steps": 3, "budgets": [1], "computed": [1, 0]},
}
"""Parameters with which a decision computes some steps of a random run and reuses others."""


def refusal(name: str) -> str | None:
    try:
        policy_class(name)
    except ConfigError as error:
        return str(error)
    return None


NAMES = [f"{decider}+{mixer}" for decider, mixer in product(POLICIES, MIXES)]
PAIRS = [name for name in NAMES if refusal(name) is None]


def test_mixes_go_by_the_first_policy_that_has_them() -> None:
    assert MIXES[:3] == [HOLDING, "taylorseer", "custom"]
    assert "seacache" not in MIXES


def test_every_decision_goes_with_every_mix_that_it_can() -> None:
    whole = {"teacache", "adacache", "magcache", "firstblock", "spectrum", "solved", "taylorseer"}
    refused = {n: str(refusal(n)) for n in NAMES if n not in PAIRS}
    assert {n for n in whole if f"{n}+spectrum" in PAIRS} == whole - {"spectrum"}
    reasons = (
        "itself",
        "decides as",
        "computes every one",
        "its own table",
        "each branch's own",
        "needs two signals",
    )
    assert all(any(reason in text for reason in reasons) for text in refused.values())
    assert all(any(reason in text for text in refused.values()) for reason in reasons)


@pytest.mark.parametrize("name", PAIRS)
def test_decisions_are_the_ones_and_mixes_the_others(name: str) -> None:
    decider, _, _ = name.partition("+")
    run = random_run(3, 30)
    setting = CacheSetting(policy=name, parameters=LOOSE.get(decider, {}))
    records = fold(DecisionLoop.eager(setting, step_count=30), run)
    alone = setting.model_copy(update={"policy": decider})
    decided = fold(DecisionLoop.eager(alone, step_count=30), run)
    assert [(r.compute, r.distance) for r in records] == [(r.compute, r.distance) for r in decided]
    assert {r.compute for r in records} == {True, False}
    parameters = policy_class(name).spec.resolve(setting.parameters)
    assert_equals_reference(records, setting, parameters, run)


def test_a_pair_that_has_a_name_is_refused_by_it() -> None:
    assert "policy 'teacache+custom': is 'custom' itself; name it 'custom'" in str(
        refusal("teacache+custom")
    )
    assert "name it 'teacache+spectrum'" in str(refusal("custom+spectrum"))
    assert "is 'dmd' itself" in str(refusal("hermite+dmd"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("teacache+solved", "fitted for the computed steps of its own table; name another mix"),
        ("easycache+dmd", "decides once for all branches, and the mix of 'dmd' is each branch's"),
        ("teacache+dicache", "the mix looks at first_block_residual, the decision at temb or"),
        ("off+spectrum", "has no step to mix: 'off' computes every one; name another decision"),
        ("teacache+spectrun", "mix 'spectrun': is not known; did you mean 'spectrum'"),
        ("spectrum+teacache", "mix 'teacache': is that of 'hold'; name it 'hold'"),
        ("teacache+seacache", "mix 'seacache': is that of 'taylorseer'; name it 'taylorseer'"),
    ],
)
def test_what_can_not_go_together_says_why(name: str, message: str) -> None:
    assert message in str(refusal(name))
    with pytest.raises(ConfigError) as caught:
        load_config(name)
    assert message in str(caught.value)
    with pytest.raises(ConfigError, match="'feature_caching'") as caught:
        parse_config({"feature_caching": name}, where="x")
    assert message in str(caught.value)


def test_config_has_the_deciders_keys_and_the_mixs_parameters() -> None:
    given = {"teacache_thresh": 0.3, "use_ret_steps": True, "degree": 3, "first_exact": 2}
    config = parse_config({"feature_caching": "teacache+spectrum", **given}, where="x")
    setting = config.setting()
    assert setting.policy == "teacache+spectrum"
    assert setting.parameters == {"threshold": 0.3, "degree": 3}
    assert (setting.signal, setting.guard.first_exact) == ("timestep_proj", 2)
    with pytest.raises(ConfigError, match=r"'warmup': is a key of spectrum, not of teacache\+spe"):
        parse_config({"feature_caching": "teacache+spectrum", "warmup": 3}, where="x")
    with pytest.raises(ConfigError, match=r"'degree': found 7, expected less than or equal to 6"):
        parse_config({"feature_caching": "teacache+spectrum", "degree": 7}, where="x")


def test_a_decider_with_a_mix_of_its_own_takes_parameters_by_their_names() -> None:
    given = {"interval": 3, "degree": 2}
    setting = parse_config({"feature_caching": "taylorseer+spectrum", **given}, where="x").setting()
    assert setting.parameters == given
    with pytest.raises(ConfigError, match=r"'order': is a key of TaylorSeer and hermite"):
        parse_config({"feature_caching": "taylorseer+spectrum", "order": 2}, where="x")


def test_a_pair_by_name_has_the_deciders_defaults() -> None:
    setting = load_config("easycache+spectrum").setting()
    assert (setting.guard.first_exact, setting.guard.last_exact) == (7, 2)
    for name in ("seacache", "seacache+hold", "seacache+spectrum"):
        guard = load_config(name).setting().guard
        assert (guard.last_exact, guard.max_consecutive) == (1, 2)
    assert load_config("magcache+custom").name == "magcache+custom"


def test_a_pairs_declaration_is_what_the_two_need() -> None:
    spec = policy_class("spectrum+dmd").spec
    assert list(spec.parameters) == ["warmup", "window", "growth", "ridge", "farthest"]
    assert (spec.kept, spec.history.depth, set(spec.state)) == (["gram"], 6, {"grown"})
    assert policy_class("magcache+dicache").spec.signals == ["first_block_residual"]
    assert policy_class("dicache+hold").spec.kept == ["previous_signal"]
    assert policy_class("taylorseer+hold").spec.history.kept({}) == 1
    assert policy_class("adacache+custom").mix.form({"trend": 1, "trend_decay": 1}) == (
        form_of("magcache+custom", {"trend": 1, "trend_decay": 1})
    )


def test_state_of_a_mix_goes_with_it() -> None:
    class Own(policy_class("foca")):  # type: ignore[misc]  # made in the table
        def decide(self, step, signal, feature, kept, state, parameters) -> Decision:
            return Decision(step.must_compute, {})

    found = pair_of(Own, HOLDING, mixes()[HOLDING])
    assert (found.spec.state, list(found.spec.parameters)) == ({}, ["interval"])
    law = DecisionLoop(found.spec, Guarded(found()), CacheSetting(policy="foca+hold"), step_count=3)
    assert [law.decide().compute for _ in range(3)] == [True, False, False]


def test_catalogue_says_of_each_mix_whether_it_goes_with_other_decisions() -> None:
    described, _ = describe_policies()
    by_name = {entry["name"]: entry["mix"] for entry in described}
    assert (by_name["teacache"], by_name["seacache"]) == ("hold", "taylorseer")
    assert by_name["spectrum"] == "spectrum"
    text = "\n".join(render(described, []))
    assert "mixes     by a law that serves other decisions too: DECISION+spectrum" in text
    assert "mixes     by a law that serves no other decision: its factors were fitted" in text
    pair, _ = describe_policies(["teacache+spectrum"])
    assert pair[0]["folds"] == ["temb", "timestep_proj"]
    assert [p["name"] for p in pair[0]["parameters"]][:3] == ["threshold", "coefficients", "degree"]
