# SPDX-License-Identifier: Apache-2.0
"""Laws beside the classes of other projects that compute them, on the same random runs.

cache-dit is no dependency: ``pip install --no-deps --target out/peers cache-dit==1.5.3``, and
``PYTHONPATH=out/peers`` for pytest.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from runs import fold, forecasts, random_run

from freewheel.policies.law import DecisionRecord, Law
from freewheel.policies.setting import CacheSetting, GuardSetting

STEPS = 30


def our_run(
    setting: CacheSetting, seed: int
) -> tuple[dict[str, np.ndarray], list[DecisionRecord], list[np.ndarray | None]]:
    run = random_run(seed, STEPS)
    records = fold(Law.eager(setting, step_count=STEPS), run)
    return run, records, forecasts(records, run["residual"])


@pytest.mark.parametrize(("interval", "exact"), [(2, []), (3, [1, 2]), (5, [1, 17]), (7, [3])])
@pytest.mark.parametrize("seed", range(2))
def test_foca_forecasts_as_cache_dits_calibrator(
    interval: int, exact: list[int], seed: int
) -> None:
    calibrators = pytest.importorskip(
        "cache_dit.caching.cache_contexts.calibrators.foca", reason="cache-dit is not installed"
    )
    setting = CacheSetting(
        policy="foca",
        parameters={"interval": interval, "history": 8},
        guard=GuardSetting(exact_steps=exact),
    )
    run, records, ours = our_run(setting, seed)
    peer, compared = calibrators.FoCaState(), 0
    for t, (record, mixed) in enumerate(zip(records, ours, strict=True)):
        peer.mark_step_begin()
        if record.compute:
            peer.update(torch.from_numpy(run["residual"][t]).double())
            continue
        theirs = peer.approximate().numpy()
        count = sum(r.compute for r in records[:t])
        # What fell out of eight residuals weighs at most 2^-7 of their spread.
        tolerance = 1e-5 if count <= 8 else 0.01 * np.ptp(run["residual"][:t])
        np.testing.assert_allclose(mixed, theirs, atol=tolerance)
        compared += count > 1
    assert compared > STEPS // 3
