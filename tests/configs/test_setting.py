# SPDX-License-Identifier: Apache-2.0
"""Settings survive the trip through a manifest."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from freewheel.configs.load import load_config, shipped_configs
from freewheel.configs.setting import CacheSetting, GuardSetting


@pytest.mark.parametrize("name", shipped_configs())
def test_setting_survives_json(name: str) -> None:
    setting = load_config(name).setting()
    assert CacheSetting.model_validate_json(setting.model_dump_json()) == setting


def test_negative_limits_and_unknown_fields_are_refused() -> None:
    with pytest.raises(ValidationError):
        GuardSetting(first_exact=-1)
    with pytest.raises(ValidationError):
        CacheSetting.model_validate({"policy": "off", "colour": "red"})
