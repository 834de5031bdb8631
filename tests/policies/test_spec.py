# SPDX-License-Identifier: Apache-2.0
"""How declared parameters check, pad and resolve what a request gives."""

from __future__ import annotations

import math

import pytest

from freewheel.core.errors import ConfigError
from freewheel.policies.spec import HistorySpec, ParameterSpec, PolicySpec


def test_vectors_are_padded_where_declared() -> None:
    front = ParameterSpec(default=[], shape=[4], pad="front", meaning="m")
    edge = ParameterSpec(default=[], shape=[4], meaning="m")
    assert front.tensor_values("p", [1, 2]) == [0, 0, 1, 2]
    assert edge.tensor_values("p", [1, 2]) == [1, 2, 2, 2]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (ParameterSpec(default=1, minimum=0, maximum=0.5, meaning="m"), "0 to 0.5"),
        (ParameterSpec(default=1, minimum=1e-6, meaning="m"), ">= 1e-06"),
        (ParameterSpec(default=1, maximum=7, meaning="m"), "<= 7"),
        (ParameterSpec(default=1, meaning="m"), "any number"),
        (ParameterSpec(default=1, dtype="int64", meaning="m"), "any integer"),
        (ParameterSpec(default=True, dtype="bool", meaning="m"), "true or false"),
        (ParameterSpec(default="a", dtype="int64", choices=["a", "b"], meaning="m"), "a or b"),
    ],
)
def test_allowed_values_are_said_in_words(spec: ParameterSpec, words: str) -> None:
    assert spec.allowed == words


def test_choice_becomes_its_index() -> None:
    spec = ParameterSpec(default="a", dtype="int64", choices=["a", "b"], meaning="m")
    assert spec.tensor_values("p", "b") == 1
    with pytest.raises(ConfigError, match=r"parameter 'p': unknown choice 'c'; known: a, b"):
        spec.tensor_values("p", "c")


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        ("float32", "1"),
        ("float32", True),
        ("float32", math.nan),
        ("float32", math.inf),
        ("float32", 3),
        ("int64", 1.0),
        ("int64", False),
        ("bool", 1),
    ],
)
def test_wrong_type_or_range_is_refused(dtype: str, value: object) -> None:
    spec = ParameterSpec(default=0, dtype=dtype, maximum=2, meaning="m")
    with pytest.raises(ConfigError, match="parameter 'p': "):
        spec.tensor_values("p", value)


def test_vector_refuses_what_does_not_fit() -> None:
    spec = ParameterSpec(default=[], shape=[2], meaning="m")
    for value in (1.0, [], [1, 2, 3], [1, "x"]):
        with pytest.raises(ConfigError, match="parameter 'p'"):
            spec.tensor_values("p", value)


def test_resolve_fills_defaults_in_and_refuses_unknown_names() -> None:
    spec = PolicySpec(
        name="x",
        summary="s",
        history=HistorySpec(maximum=1),
        parameters={"level": ParameterSpec(default=3.0, meaning="m")},
    )
    assert spec.resolve({}) == {"level": 3.0}
    assert spec.resolve({"level": 4}) == {"level": 4}
    with pytest.raises(ConfigError, match="did you mean 'level'"):
        spec.resolve({"levle": 4})


def test_history_depth_is_fixed_or_follows_a_parameter() -> None:
    assert HistorySpec(maximum=2, depth=2).kept({}) == 2
    follows = HistorySpec(maximum=5, parameter="order", offset=1)
    assert follows.kept({"order": 1}) == 2
    assert follows.kept({"order": 9}) == 5
