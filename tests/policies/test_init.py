# SPDX-License-Identifier: Apache-2.0
"""The table of policies."""

from __future__ import annotations

import pytest

from freewheel.configs.errors import ConfigError
from freewheel.configs.policy_configs import CACHING_CONFIGS
from freewheel.policies import POLICIES, policy


def test_every_row_gives_a_policy_of_its_name() -> None:
    assert [policy(name).spec.name for name in POLICIES] == list(POLICIES)


def test_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(
        ConfigError, match=r"policy 'teecache': is not known; did you mean 'teacache'"
    ):
        policy("teecache")


def test_every_caching_config_names_a_policy_of_the_table() -> None:
    assert {c.policy for c in CACHING_CONFIGS.values()} == set(POLICIES)
