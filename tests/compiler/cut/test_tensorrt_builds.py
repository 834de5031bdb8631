# SPDX-License-Identifier: Apache-2.0
"""TensorRT-RTX compiles every graph of every class's bundle, ahead of time and with no GPU."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from cases import case
from test_bundles import FOUND

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from bundles import save

from freewheel.bundle.manifest import ConfigEntry, GenerationDefaults
from freewheel.bundle.reader import Bundle
from freewheel.compiler.build import build
from freewheel.compiler.engine_layers import attention_of
from freewheel.compiler.plan import plan
from freewheel.compiler.request import BuildRequest
from freewheel.engines import Target
from freewheel.policies.setting import CacheSetting

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
from freewheel.engines.tensorrt import TensorRTRTX

pytestmark = [pytest.mark.tensorrt, pytest.mark.nightly]

OFF = {"off": ConfigEntry(cache=CacheSetting(), generation=GenerationDefaults())}

TOLD = os.environ.get("FREEWHEEL_TENSORRT_TABLE")
"""File that gets a line of JSON for each class: engines, attentions, fused ones, seconds."""


@pytest.mark.parametrize("name", FOUND)
def test_every_graph_compiles(name: str, tmp_path: Path, build_cache: Path) -> None:
    one = case(name)
    request = BuildRequest(
        model=str(save(one.model, tmp_path / "model")), out=tmp_path / "bundle", configs=OFF,
        backends=[TensorRTRTX()], target=Target(compute_capabilities=("8.9",)),
        precision="bfloat16", row=one.row, policies=["off", "teacache"], cache=build_cache,
    )  # fmt: skip
    began = time.perf_counter()
    build(plan(request))
    seconds = round(time.perf_counter() - began, 1)
    bundle = Bundle(request.out)
    (engines,) = bundle.manifest.engines
    assert engines.files.keys() == bundle.manifest.graphs.keys()
    blocks = {stage.block for stage in bundle.manifest.stages}
    found: dict[str, Any] = {"engines": len(engines.files), "blocks": {}}
    for graph in engines.files:
        (record,) = bundle.folder.glob(f"engines/*/{graph}/engine.json")
        told = json.loads(record.read_text())
        attention = attention_of(told["details"])
        assert attention is not None
        if graph in blocks:
            found["blocks"][graph] = [attention["fused"], attention["nodes"]]
    if TOLD:
        with Path(TOLD).open("a") as file:
            print(
                json.dumps({"case": name, "class": one.row.model, **found, "seconds": seconds}),
                file=file,
            )
