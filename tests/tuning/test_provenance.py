"""Where figures come from, in words."""

from __future__ import annotations

from datetime import UTC, datetime

import torch

from freewheel.bundle.reader import Bundle
from freewheel.tuning.provenance import provenance


def test_every_fact_is_told(demo_bundle: Bundle) -> None:
    when = datetime(2026, 1, 2, 3, 4, tzinfo=UTC)
    rows = provenance(demo_bundle, "openvino", ["freewheel", "run", "a b"], now=when)
    facts = dict(rows)
    checkpoint = demo_bundle.manifest.checkpoint
    assert facts["command"] == "freewheel run 'a b'"
    assert facts["bundle"].startswith(str(demo_bundle.folder))
    assert checkpoint.sha256[:16] in facts["checkpoint"]
    assert "revision" not in facts["checkpoint"]
    assert facts["transformer"].startswith("WanTransformer3DModel, ")
    assert facts["backend"] == "openvino"
    assert "cores" in facts["machine"]
    assert f"torch {torch.__version__}" in facts["versions"]
    assert facts["written"] == "2026-01-02 03:04 UTC"
