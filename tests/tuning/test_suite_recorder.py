# SPDX-License-Identifier: Apache-2.0
"""A suite of the demo model: what it keeps, and that it foretells a real run's distance."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import spearmanr

from freewheel.bundle.reader import Bundle
from freewheel.core.progress import Silent
from freewheel.policies.setting import CacheSetting, GuardSetting
from freewheel.runtime.pipeline.generate import Generator
from freewheel.runtime.pipeline.request import GenerationRequest
from freewheel.runtime.settings import choose_setting
from freewheel.tuning.contest import BY_CONTENT, adacache_settings, even_settings
from freewheel.tuning.rank import SPEEDUPS, contest_of, rank
from freewheel.tuning.suite import Suite
from freewheel.tuning.suite_recorder import suite_beside, suite_of

pytestmark = pytest.mark.nightly

PROMPTS = [
    "a red circle moving right on a gray background",
    "a white ring growing on a navy background",
]
STEPS = 12


@pytest.fixture(scope="module")
def suite(small_demo: Bundle) -> Suite:
    return suite_of(small_demo, PROMPTS, steps=STEPS, first_seed=1000, progress=Silent())


def test_a_suite_is_recorded_once(small_demo: Bundle, suite: Suite) -> None:
    path = suite_beside(small_demo, STEPS, len(PROMPTS))
    written = path.stat().st_mtime_ns
    again = suite_of(small_demo, PROMPTS, steps=STEPS, first_seed=1000, progress=Silent())
    assert path.stat().st_mtime_ns == written
    setting = dict(even_settings(STEPS, {2.0: 2.0}))["taylorseer 2"]
    assert again.foretell(setting).mean == pytest.approx(suite.foretell(setting).mean, abs=0.2)
    assert set(suite.runs[0].answers) == {"cond", "uncond"}
    assert sum(suite.guidance.values()) == 1.0


def test_distances_are_those_of_real_runs_within_some_db(small_demo: Bundle, suite: Suite) -> None:
    generator = Generator(small_demo)
    base = choose_setting(small_demo, None, {}, lambda text: None).generation
    settings = dict(even_settings(STEPS, {1.5: 1.5, 2.0: 2.0, 3.0: 3.0}))
    settings["late"] = CacheSetting(
        policy="taylorseer",
        parameters={"interval": 1000},
        guard=GuardSetting(exact_steps=[7, 8, 9, 10, 11]),
    )
    found, real = [], []
    for setting in settings.values():
        request = GenerationRequest(
            prompt=PROMPTS[0], cache=CacheSetting(), defaults=base, steps=STEPS, seed=1000
        )
        exact, cached = (
            generator.generate(replace(request, cache=c)).latents for c in (CacheSetting(), setting)
        )
        assert exact is not None
        assert cached is not None
        apart = (cached - exact).square().mean() / exact.square().mean()
        real.append(10 * float(np.log10(apart)))
        found.append(suite.foretell(setting).distances[0])
    assert spearmanr(found, real).statistic > 0.85
    assert np.median(np.abs(np.subtract(found, real))) < 4.0


def test_every_policy_is_ranked_within_its_speedup(small_demo: Bundle, suite: Suite) -> None:
    names = set(contest_of(suite, small_demo.manifest.policies, None))
    assert {f"taylorseer {x:g}" for x in SPEEDUPS} < names
    assert {name for name, _ in adacache_settings()} < names
    for policy in BY_CONTENT:
        assert (f"{policy} 2" in names) == (policy in small_demo.manifest.policies)
    ranked = rank(suite, ["firstblock"], None, Silent())
    twice = [r.foretold.mean for r in ranked if r.name.endswith(" 2")]
    assert twice == sorted(twice)
    assert {"firstblock 2", "taylorseer 4"} < {r.name for r in ranked}
