# SPDX-License-Identifier: Apache-2.0
"""One recorded run of the demo model, and its lockstep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from freewheel.bundle.reader import Bundle
from freewheel.configs.setting import CacheSetting
from freewheel.runtime.generate import Generator
from freewheel.tuning.gram import GramRecorder
from freewheel.tuning.lockstep import Lockstep, sampler_rows

STEPS = 20
GUIDANCE = {"cond": 3.0, "uncond": -2.0}


@dataclass(frozen=True)
class Recorded:
    """An uncached run of 20 steps."""

    recorder: GramRecorder
    latents: Tensor
    sigmas: np.ndarray


@pytest.fixture(scope="session")
def recorded(demo_bundle: Bundle, generator: Generator, request_of: Any) -> Recorded:
    recorder = GramRecorder(generator.transformer.session.model, window=8)
    result = generator.generate(request_of(CacheSetting(), steps=STEPS), recorder=recorder)
    sigmas = np.append(recorder.tables["timesteps"] / 1000.0, 0.0)
    return Recorded(recorder, result.latents, sigmas)


@pytest.fixture(scope="session")
def lockstep(demo_bundle: Bundle, generator: Generator, recorded: Recorded) -> Lockstep:
    rows = sampler_rows(demo_bundle, recorded.recorder.tables["timesteps"])
    assert rows is not None
    model = generator.transformer.session.model
    return Lockstep(model, recorded.recorder.starts, rows, GUIDANCE, history=4)
