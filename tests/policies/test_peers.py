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
from test_dmd import swing

from freewheel.policies.decision_loop import DecisionLoop, DecisionRecord
from freewheel.policies.setting import CacheSetting, GuardSetting

STEPS = 30


def our_run(
    setting: CacheSetting, seed: int
) -> tuple[dict[str, np.ndarray], list[DecisionRecord], list[np.ndarray | None]]:
    run = random_run(seed, STEPS)
    records = fold(DecisionLoop.eager(setting, step_count=STEPS), run)
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


@pytest.mark.parametrize("interval", [2, 3, 4])
def test_dmd_forecasts_as_near_as_cache_dits_calibrator(interval: int) -> None:
    """Exponentials are both laws' case; ours interpolates where cache-dit takes powers.

    Compared from four residuals on: with fewer, cache-dit's differences are those of the computed step
    before the last one, over the last one's distance.
    """
    calibrators = pytest.importorskip(
        "cache_dit.caching.cache_contexts.calibrators.dmd", reason="cache-dit is not installed"
    )
    run = random_run(0, STEPS)
    run["residual"] = swing()
    setting = CacheSetting(policy="dmd", parameters={"interval": interval, "ridge": 1e-5})
    records = fold(DecisionLoop.eager(setting, step_count=STEPS), run)
    peer, last = calibrators.DMDState(history=6), 0
    mixes = forecasts(records, run["residual"])
    for t, (record, mixed) in enumerate(zip(records, mixes, strict=True)):
        peer.mark_step_begin()
        residual = run["residual"][t]
        if record.compute:
            peer.update(torch.from_numpy(residual).double().unsqueeze(0))
            last = t
            continue
        theirs = peer.approximate().numpy()[0]
        step = np.linalg.norm(residual - run["residual"][last])
        if sum(r.compute for r in records[:t]) >= 4:
            assert np.linalg.norm(mixed - theirs) < 0.03 * step, t
