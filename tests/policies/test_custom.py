# SPDX-License-Identifier: Apache-2.0
"""Custom decides as TeaCache and mixes as TaylorSeer of order 1."""

from __future__ import annotations

import numpy as np
from runs import fold, random_run

from freewheel.configs.setting import CacheSetting
from freewheel.policies.law import Law


def test_custom_decides_as_teacache() -> None:
    run = random_run(5, 40)
    parameters = {"threshold": 0.5}
    custom, tea = (
        fold(Law.eager(CacheSetting(policy=p, parameters=parameters), step_count=40), run)
        for p in ("custom", "teacache")
    )
    assert [(r.compute, r.distance) for r in custom] == [(r.compute, r.distance) for r in tea]
    assert {r.compute for r in custom} == {True, False}


def test_custom_holds_with_one_residual_and_extrapolates_with_two() -> None:
    # The change doubles the distance at step 3, so that steps 0 and 3 are computed.
    signals = np.array([1, 1, 1, 9, 9, 9], np.float32)[:, None, None] * np.ones((1, 4), np.float32)
    law = Law.eager(CacheSetting(policy="custom", parameters={"threshold": 0.5}), step_count=6)
    records = [law.decide(signal) for signal in signals]
    assert [r.compute for r in records] == [True, False, False, True, False, False]
    assert records[2].mix == [1, 0]
    np.testing.assert_allclose(records[4].mix, [1 + 1 / 3, -1 / 3], rtol=1e-6)
    np.testing.assert_allclose(records[5].mix, [1 + 2 / 3, -2 / 3], rtol=1e-6)
