# SPDX-License-Identifier: Apache-2.0
"""What `freewheel configs` says of each shipped config is what its file says."""

from __future__ import annotations

import pytest

from freewheel.configs.catalogue import COLUMNS, cells, describe_configs, model_of
from freewheel.configs.load import load_config, shipped_configs
from freewheel.core.errors import ConfigError


def test_every_shipped_config_is_described() -> None:
    described = {entry["name"]: entry for entry in describe_configs()}
    assert list(described) == list(shipped_configs())
    for name, entry in described.items():
        config = load_config(name)
        assert entry["cache"]["policy"] == entry["policy"] == config.setting().policy
        assert (entry["steps"], entry["height"]) == (config.infer_steps, config.target_height)
        assert entry["model"] == model_of(name)


def test_the_table_has_a_row_per_config_with_size_and_steps() -> None:
    (entry,) = describe_configs(["wan_t2v_1_3b_tea_480p"])
    row = dict(zip(COLUMNS, cells(entry), strict=True))
    assert row["model"] == "Wan 2.1 text-to-video 1.3B"
    assert row["frames×height×width"] == "81×480×832"
    assert (row["steps"], row["guidance"], row["shift"]) == ("50", "6", "8")


def test_a_config_that_does_not_ship_says_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"does not ship; did you mean 'wan_t2v_ada'"):
        describe_configs(["wan_t2v_adaa"])
