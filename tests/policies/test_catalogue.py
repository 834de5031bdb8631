# SPDX-License-Identifier: Apache-2.0
"""What `freewheel policies` says of each policy is what its declaration and a bundle say."""

from __future__ import annotations

import pytest

from freewheel.bundle.reader import Bundle
from freewheel.core.errors import ConfigError
from freewheel.policies import POLICIES, policy_class
from freewheel.policies.catalogue import (
    TIMESTEP_SIGNALS,
    describe_guard,
    describe_policies,
    render,
)
from freewheel.policies.setting import GUARD_PARAMETERS


def test_every_policy_is_described_with_every_parameter() -> None:
    described, faults = describe_policies()
    assert faults == []
    assert [entry["name"] for entry in described] == list(POLICIES)
    for entry in described:
        spec = policy_class(entry["name"]).spec
        assert [p["name"] for p in entry["parameters"]] == list(spec.parameters)
        assert all(p["meaning"] and p["allowed"] for p in entry["parameters"])
    assert [p["name"] for p in describe_guard()] == list(GUARD_PARAMETERS)


def test_lines_say_default_range_meaning_and_config_key() -> None:
    described, _ = describe_policies(["teacache", "taylorseer", "solved"])
    text = "\n".join(render(described, describe_guard()))
    assert "--set threshold=0.2  [>= 0]  accumulated distance" in text
    assert "(config key teacache_thresh)" in text
    assert "2 residuals (order + 1, at most 5) per branch" in text
    assert "every step before step 0 with temb or timestep_proj, else step by step" in text
    assert "[taylor or newton]" in text
    assert "--set first_exact=1" in text


def test_what_decides_ahead_is_what_a_bundle_knows_ahead(demo_bundle: Bundle) -> None:
    known = {n: s.known == "run" for n, s in demo_bundle.manifest.signals.items()}
    assert {n for n, ahead in known.items() if ahead} == set(TIMESTEP_SIGNALS)


def test_a_name_that_is_not_known_says_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'tecache': is not known; did you mean 'teacache'"):
        describe_policies(["tecache"])


def test_a_faulty_policy_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(POLICIES, "broken", "no_such_file:Broken")
    described, faults = describe_policies()
    assert len(described) == len(POLICIES) - 1
    assert "policy 'broken', policies/no_such_file.py: can't be imported" in str(faults[0])
