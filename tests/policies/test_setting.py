# SPDX-License-Identifier: Apache-2.0
"""Settings survive the trip through a manifest."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from freewheel.configs.load import load_config, shipped_configs
from freewheel.policies.config import CachingConfig
from freewheel.policies.setting import GUARD_PARAMETERS, CacheSetting, GuardSetting


@pytest.mark.parametrize("name", shipped_configs())
def test_setting_survives_json(name: str) -> None:
    setting = load_config(name).setting()
    assert CacheSetting.model_validate_json(setting.model_dump_json()) == setting


def test_negative_limits_and_unknown_fields_are_refused() -> None:
    with pytest.raises(ValidationError):
        GuardSetting(first_exact=-1)
    with pytest.raises(ValidationError):
        CacheSetting.model_validate({"policy": "off", "colour": "red"})


def test_the_guard_is_declared_once_for_files_settings_and_graphs() -> None:
    assert set(GuardSetting.model_fields) == {*GUARD_PARAMETERS, "exact_steps"}
    assert {n: spec.default for n, spec in GUARD_PARAMETERS.items()} == {
        n: getattr(GuardSetting(), n) for n in GUARD_PARAMETERS
    }
    for name in GuardSetting.model_fields:
        assert CachingConfig.model_fields[name].default is None, "the policy decides"
    with pytest.raises(ValidationError):
        CachingConfig.model_validate({"feature_caching": "Tea", "exact_steps": [-1]})
