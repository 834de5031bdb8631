# SPDX-License-Identifier: Apache-2.0
"""The table of policies, what it says of a faulty row, and configs of policies that declare none."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest

from freewheel import policies as table
from freewheel.configs.load import load_config, parse_config
from freewheel.core.errors import ConfigError
from freewheel.policies import (
    POLICIES,
    config_kinds,
    form_of,
    policies,
    policy,
    policy_class,
    policy_config,
)
from freewheel.policies.base import Decision, Policy
from freewheel.policies.config import CachingConfig
from freewheel.policies.spec import HistorySpec, ParameterSpec, PolicySpec

PACE = PolicySpec(
    name="pace",
    summary="computes one step in so many",
    history=HistorySpec(maximum=1),
    parameters={
        "every": ParameterSpec(default=2, dtype="int64", minimum=1, maximum=9, meaning="steps"),
        "gains": ParameterSpec(default=[1.0], shape=[3], minimum=0.0, meaning="factors"),
        "kind": ParameterSpec(default="a", dtype="int64", choices=["a", "b"], meaning="a or b"),
        "wide": ParameterSpec(default=False, dtype="bool", meaning="wide or not"),
    },
)


def law(**attributes: Any) -> type[Policy]:
    def decide(self: Policy, *_: Any) -> Decision:
        raise AssertionError("is not run here")

    return type("Pace", (Policy,), {"spec": PACE, "decide": decide, **attributes})


@pytest.fixture
def with_row(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[object], None]]:
    """Give the table a row ``pace`` whose module holds what is given."""

    def put(found: object) -> None:
        module = ModuleType("freewheel.policies.pace")
        module.Pace = found  # type: ignore[attr-defined]  # made here
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(POLICIES, "pace", "pace:Pace")

    cached = (policy_class, policy_config)
    for function in cached:
        function.cache_clear()
    yield put
    for function in cached:
        function.cache_clear()


def test_every_row_gives_a_policy_of_its_name() -> None:
    assert [policy(name).spec.name for name in POLICIES] == list(POLICIES) == list(policies())


def test_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(
        ConfigError, match=r"policy 'teecache': is not known; did you mean 'teacache'"
    ):
        policy("teecache")


def test_every_policy_has_its_own_kinds_of_config() -> None:
    kinds, faults = config_kinds()
    assert {c.policy for c in kinds.values()} == set(POLICIES)
    assert len(kinds) == len(POLICIES) + 1, "'None' is another word for 'NoCaching' alone"
    assert faults == []


def test_a_row_is_usable_by_name_with_no_config_model(with_row: Callable[[object], None]) -> None:
    with_row(law())
    assert load_config("pace").setting().model_dump(exclude_defaults=True) == {"policy": "pace"}
    given = {"every": 3, "gains": [1, 2.5], "kind": "b", "wide": True}
    setting = parse_config({"feature_caching": "pace", "seed": 4, **given}, where="x").setting()
    assert (setting.policy, setting.parameters) == ("pace", given)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"every": 10}, "'every': found 10, expected less than or equal to 9"),
        ({"every": "3"}, "'every': found \"3\", expected a valid integer"),
        ({"gains": [1.0, -1.0]}, "'gains[1]': found -1.0, expected greater than or equal to 0"),
        ({"gains": [1.0] * 4}, "at most 3 values"),
        ({"kind": "c"}, "'kind': found \"c\", expected one of a, b"),
        ({"evry": 3}, "'evry': is not a known key; did you mean 'every'?"),
    ],
)
def test_ranges_of_such_a_config_are_those_of_the_declaration(
    with_row: Callable[[object], None], keys: dict[str, Any], message: str
) -> None:
    with_row(law())
    with pytest.raises(ConfigError) as caught:
        parse_config({"feature_caching": "pace", **keys}, where="x")
    assert message in caught.value.what


class Unrelated(CachingConfig):
    policy: ClassVar[str] = "pase"
    keys: ClassVar[dict[str, str]] = {"evry": "evry"}

    feature_caching: str = "Pace"


def spec(**changes: Any) -> PolicySpec:
    return PACE.model_copy(update=changes)


BAD_DEFAULT = ParameterSpec(default=0, dtype="int64", minimum=1, meaning="steps")
FAULTY: dict[str, tuple[object, str]] = {
    "no policy": (SimpleNamespace(), "is no subclass of Policy"),
    "no spec": (type("Pace", (Policy,), {}), "declares no 'spec', expected a PolicySpec"),
    "name": (law(spec=spec(name="pase")), "spec.name is 'pase', its row says 'pace'"),
    "no law": (type("Pace", (Policy,), {"spec": PACE}), "has no 'decide'"),
    "default": (
        law(spec=spec(parameters={"every": BAD_DEFAULT})),
        "default of parameter 'every' 0 is outside [1.0, inf]",
    ),
    "history": (
        law(spec=spec(history=HistorySpec(maximum=2, parameter="order"))),
        "history.parameter 'order' is not one of its parameters",
    ),
    "distance": (law(spec=spec(distance="way")), "distance 'way' is not part of its state"),
    "kept": (
        law(spec=spec(kept=["previous_signal"])),
        "keeps 'previous_signal' and declares no signals",
    ),
    "taken": (
        law(spec=spec(parameters={"seed": BAD_DEFAULT.model_copy(update={"default": 1})})),
        "parameter 'seed' is called as something of every config",
    ),
    "config": (
        law(config=Unrelated),
        "its config Unrelated is of policy 'pase'; key 'evry' is no field of its config Unrelated; "
        "key 'evry' sets 'evry', which is not one of its parameters",
    ),
}


@pytest.mark.parametrize("fault", FAULTY)
def test_a_faulty_declaration_is_one_error_and_stops_nobody_else(
    with_row: Callable[[object], None], fault: str
) -> None:
    found, message = FAULTY[fault]
    with_row(found)
    for ask in (lambda: policy("pace"), lambda: load_config("pace"), policies):
        with pytest.raises(ConfigError) as caught:
            ask()
        assert caught.value.where == "policy 'pace', policies/pace.py"
        assert message in caught.value.what
        assert "policies/__init__.py" in caught.value.hint
    assert load_config("teacache").policy == "teacache"
    assert load_config("wan_t2v_custom_1_3b").policy == "custom"
    assert form_of("pace", {}) == ""
    with pytest.raises(
        ConfigError, match=r"no such policy.*left out: policy 'pace', policies/pace"
    ):
        parse_config({"feature_caching": "pace"}, where="x")


def test_a_file_that_can_not_be_imported_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(POLICIES, "pace", "pace:Pace")
    with pytest.raises(ConfigError, match=r"can't be imported: ModuleNotFoundError: No module"):
        policy("pace")
    monkeypatch.setitem(POLICIES, "pace", "off:Of")
    with pytest.raises(ConfigError, match=r"policies/off.py: can't be imported: AttributeError"):
        policy("pace")
    assert table.policy("off").spec.name == "off"


def test_only_a_law_with_several_forms_names_one() -> None:
    assert form_of("custom", {"trend": 1, "trend_decay": 1}) == "published forecast"
    assert form_of("teacache", {}) == form_of("of another install", {}) == ""
