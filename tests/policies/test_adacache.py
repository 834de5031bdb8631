# SPDX-License-Identifier: Apache-2.0
"""AdaCache's schedule, one behaviour at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from runs import step_at

from freewheel.policies.adacache import AdaCache, motion, skip_from_codebook
from freewheel.policies.decision_loop import DecisionLoop, parameter_tensors
from freewheel.policies.setting import CacheSetting, GuardSetting

STILL = {"moreg_power": 0.0, "mograd": 0.0}
"""Motion always 1, its growth ignored: the codebook sees the feature's change alone."""


def computed(
    features: np.ndarray, guard: GuardSetting | None = None, **parameters: object
) -> list[int]:
    setting = CacheSetting(policy="adacache", parameters=parameters, guard=guard or GuardSetting())
    law = DecisionLoop.eager(setting, step_count=len(features))
    return [
        t
        for t in range(len(features))
        if law.decide(
            feature=None if law.last_computed is None else features[law.last_computed]
        ).compute
    ]


def growing(rate: float, steps: int) -> np.ndarray:
    return (1 + rate) ** np.arange(steps, dtype=np.float32)[:, None, None, None] * np.ones(
        (3, 4, 5), np.float32
    )


def skips(distances: list[float], steps: int = 100, **parameters: object) -> list[int]:
    tensors = parameter_tensors(AdaCache.spec.parameters, parameters)
    count = torch.tensor(steps)
    return [int(skip_from_codebook(torch.tensor(d), tensors, count)) for d in distances]


def test_codebook_gives_the_first_entry_whose_threshold_exceeds() -> None:
    distances = [0.0, 0.029, 0.03, 0.05, 0.07, 0.09, 0.11, 0.99, 1.0, 50.0]
    assert skips(distances) == [12, 12, 10, 8, 6, 4, 3, 3, 3, 3]


def test_scaled_codebook_is_rounded_and_at_least_1() -> None:
    distances = [0.0, 0.03, 0.05, 0.07, 0.09, 0.11]
    assert skips(distances, 30, scale_codebook=True) == [4, 3, 2, 2, 1, 1]
    assert skips(distances, 10, scale_codebook=True) == [1, 1, 1, 1, 1, 1]
    assert skips(distances, 200, scale_codebook=True) == [24, 20, 16, 12, 8, 6]


def test_constant_feature_is_held_for_the_longest_interval() -> None:
    # Steps 0 and 1 give the two features; then 12 steps each.
    assert computed(growing(0.0, 40), **STILL) == [0, 1, 13, 25, 37]


def test_change_is_divided_by_the_interval_it_took() -> None:
    # 6 % between the first two, interval 8; then (1.06⁸ − 1)/8 = 7.4 % a step, interval 6; then
    # (1.06⁶ − 1)/6 = 6.98 %, just below 7 %, interval 8.
    assert computed(growing(0.06, 24), **STILL) == [0, 1, 9, 15, 23]


def test_step_computed_by_force_reschedules() -> None:
    free = computed(growing(0.0, 40), **STILL)
    forced = computed(growing(0.0, 40), GuardSetting(exact_steps=[5]), **STILL)
    assert free[2] == 13
    assert forced == [0, 1, 5, 17, 29]


def test_zero_or_broken_feature_computes_the_next_step() -> None:
    features = growing(0.0, 20)
    features[0] = 0
    assert computed(features, **STILL)[:4] == [0, 1, 2, 14]
    features = growing(0.0, 20)
    features[1, 0, 0, 0] = np.nan
    assert computed(features, **STILL)[:4] == [0, 1, 2, 3]


def test_motion_of_a_single_frame_is_zero_and_of_equal_frames_too() -> None:
    assert motion(torch.ones(1, 4, 5)) == 0
    assert motion(torch.ones(3, 4, 5)) == 0


def test_motion_compares_neighbouring_frames() -> None:
    # Frames 1, 3: |3 − 1| / (3 + 1). A shift by another stride would mix tokens of one frame.
    feature = torch.tensor([1.0, 3.0])[:, None, None] * torch.ones(2, 4, 5)
    assert float(motion(feature)) == pytest.approx(0.5)


@pytest.mark.parametrize("steps", [7, 10, 20, 30, 33, 40, 50, 99, 100, 1000])
def test_motion_counts_in_the_inclusive_window(steps: int) -> None:
    law = AdaCache()
    parameters = parameter_tensors(law.spec.parameters, {})
    inside = [
        t for t in range(steps) if law._in_moreg_window(step_at(t + 1, [t], 1, steps), parameters)
    ]
    assert inside == list(range(int(0.1 * steps), int(0.9 * steps) + 1))


def test_motion_and_its_growth_shorten_the_interval() -> None:
    features = growing(0.02, 30) * np.array([1, 9, 1], np.float32)[:, None, None]
    calm = computed(growing(0.02, 30))
    moving = computed(features)
    assert len(moving) > len(calm)
