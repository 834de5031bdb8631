# SPDX-License-Identifier: Apache-2.0
"""A plan's manifest is the built one's, all but what bytes tell, and planning writes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from freewheel.bundle.manifest import Manifest, PlannedManifest
from freewheel.bundle.reader import Bundle
from freewheel.compiler.plan import plan
from freewheel.compiler.request import BuildRequest
from freewheel.core.errors import OutputError
from freewheel.engines import backend
from freewheel.runtime.settings import config_entries

OF_BYTES = {
    "pipeline",
    "tokenizer",
    "graphs",
    "sequence",
    "tensors",
    "engines",
    "samplers",
    "files",
}


@pytest.fixture
def request_of(tiny_checkpoint: Path, tmp_path: Path) -> BuildRequest:
    configs = config_entries(["off"], lambda text: None)
    return BuildRequest(str(tiny_checkpoint), tmp_path / "out", [backend("onnxruntime")], configs)


def test_a_planned_manifest_is_the_built_one_without_bytes(
    request_of: BuildRequest, tiny_bundle: Bundle
) -> None:
    planned = plan(request_of).manifest
    built = tiny_bundle.manifest.model_dump(exclude=OF_BYTES)
    assert built["checkpoint"].pop("sha256")
    assert planned.model_dump() == built
    assert Manifest.model_fields.keys() - PlannedManifest.model_fields.keys() == OF_BYTES


def test_planning_writes_nothing(request_of: BuildRequest, tmp_path: Path) -> None:
    planned = plan(request_of)
    assert planned.graph_count > 0
    assert list(tmp_path.iterdir()) == []


def test_a_target_that_stands_is_refused_before_the_model_is_read(
    request_of: BuildRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    (request_of.out / "mine").mkdir(parents=True)
    monkeypatch.setattr("freewheel.compiler.plan.open_checkpoint", None)
    with pytest.raises(OutputError, match="out"):
        plan(request_of)
