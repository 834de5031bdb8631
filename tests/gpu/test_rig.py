# SPDX-License-Identifier: Apache-2.0
"""The script for a GPU machine, rehearsed on a CPU: what it carries, and that it ends well."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rig import SECTIONS

pytestmark = [pytest.mark.nightly, pytest.mark.tensorrt]

MOST_CARRIED = 64 << 20


@pytest.mark.usefixtures("real_trt")  # skipped where TensorRT's bindings can't be had
def test_the_rig_carries_little_and_is_rehearsed_from_end_to_end(
    repository: Path, tmp_path: Path
) -> None:
    def rig(*arguments: Any) -> Any:
        command = [sys.executable, repository / "tests" / "gpu" / "rig.py", *arguments]
        return subprocess.run(
            [str(c) for c in command], capture_output=True, text=True, check=False
        )

    folder, report = tmp_path / "rig", tmp_path / "report.md"
    packed = rig("pack", folder)
    assert packed.returncode == 0, packed.stderr
    carried = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    assert carried < MOST_CARRIED
    done = rig("run", folder, "--rehearse", "--minutes", 240, "--report", report)
    told = report.read_text(encoding="utf-8")
    assert done.returncode == 0, told + report.with_suffix(".log").read_text(encoding="utf-8")
    assert [line for line in told.splitlines() if line.startswith("## ")] == [
        *(f"## {title}" for title, _ in SECTIONS),
        "## What only TensorRT itself can show",
    ]
