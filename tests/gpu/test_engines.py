# SPDX-License-Identifier: Apache-2.0
"""Every engine gives what its PyTorch module gives, and every compiled policy what its law gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from gpu_report import Report

from freewheel.bundle.reader import Bundle
from freewheel.compiler.verify.bundle import VerifyReport, verify_bundle

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

COLUMNS = (
    "model",
    "engines",
    "body",
    "weights",
    "outputs equal",
    "worst of its tolerance",
    "policies",
)


@pytest.mark.parametrize("weights", ["inputs", "baked"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_engines_of_the_demo_equal_pytorch(
    engines: str, demo: Callable[..., Bundle], report: Report, precision: str, weights: str
) -> None:
    found = verify_bundle(demo(precision, weights), engines)
    report.table("Engines against PyTorch", COLUMNS, [row("demo", found, precision, weights)])
    found.raise_on_mismatch()


def test_engines_of_an_image_to_video_model_equal_pytorch(
    engines: str, build: Callable[..., Bundle], i2v_checkpoint: Path, report: Report
) -> None:
    sizes = ("--height", "64:80:96", "--width", "64:80:96", "--frames", "5:9:9")
    found = verify_bundle(build(i2v_checkpoint, "--config", "wan_i2v_ada", *sizes), engines)
    about = row("tiny image-to-video", found, "float32", "inputs")
    report.table("Engines against PyTorch", COLUMNS, [about])
    found.raise_on_mismatch()


def row(model: str, found: VerifyReport, precision: str, weights: str) -> list[object]:
    checks = [c for c in found.engines if c.form == found.backend]
    policies = [c for c in found.policies if c.form == found.backend]
    assert checks
    assert policies
    worst = max(
        (float("inf") if c.error is None else c.error / c.tolerance, c.graph) for c in checks
    )
    return [
        model,
        found.backend,
        precision,
        weights,
        f"{sum(c.ok for c in checks)} of {len(checks)}",
        f"{worst[0]:.2f} (`{worst[1]}`)",
        f"{sum(c.ok for c in policies)} of {len(policies)}",
    ]
