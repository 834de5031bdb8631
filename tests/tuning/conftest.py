# SPDX-License-Identifier: Apache-2.0
"""One recorded run of the demo model, and its lockstep."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from freewheel.bundle.reader import Bundle
from freewheel.policies.setting import CacheSetting
from freewheel.runtime.pipeline.generate import Generator
from freewheel.tuning.gram import GramRecorder
from freewheel.tuning.lockstep import Lockstep, sampler_table

STEPS = 20
GUIDANCE = {"cond": 3.0, "uncond": -2.0}


@dataclass(frozen=True)
class Recorded:
    """An uncached run of 20 steps."""

    recorder: GramRecorder
    latents: Tensor
    sigmas: np.ndarray


@pytest.fixture(scope="session")
def small_demo(demo_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The demo bundle whose runs are of 5 frames of 48 x 48 unless asked otherwise: 10 times faster."""
    folder = tmp_path_factory.mktemp("small") / "bundle"
    shutil.copytree(demo_bundle.folder, folder)
    path = Path(folder / "manifest.json")
    manifest = json.loads(path.read_text())
    for entry in manifest["configs"].values():
        entry["generation"] |= {"frames": 5, "height": 48, "width": 48}
    path.write_text(json.dumps(manifest))
    return Bundle(folder)


@pytest.fixture(scope="session")
def recorded(demo_bundle: Bundle, generator: Generator, request_of: Any) -> Recorded:
    recorder = GramRecorder(generator.transformer.session.model, window=8)
    result = generator.generate(request_of(CacheSetting(), steps=STEPS), recorder=recorder)
    sigmas = np.append(recorder.tables["sigmas"], 0.0)
    return Recorded(recorder, result.latents, sigmas)


@pytest.fixture(scope="session")
def lockstep(demo_bundle: Bundle, generator: Generator, recorded: Recorded) -> Lockstep:
    table = sampler_table(demo_bundle, recorded.recorder.tables["timesteps"])
    assert table is not None
    model = generator.transformer.session.model
    return Lockstep(model, recorded.recorder.starts, table, GUIDANCE, history=4)
