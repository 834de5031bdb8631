"""No package of a vendor reports that it was used, unless the user asks for that."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from freewheel.core.telemetry import ASK

FAKE = """
from pathlib import Path
class Telemetry:
    def __init__(self, *args, **kwargs): pass
    def send_event(self, *event): Path(__file__).with_name('sent').write_text(str(event))
"""
"""Stands for OpenVINO's package of that name, and keeps the event instead of sending it."""

USE = "import freewheel, os, openvino; print(os.environ.get('ORT_DISABLE_TELEMETRY'))"


@pytest.mark.parametrize("asked", [False, True])
def test_vendors_are_told_nothing_unless_asked(tmp_path: Path, asked: bool) -> None:
    package = tmp_path / "openvino_telemetry"
    (package / "backend").mkdir(parents=True)
    (package / "__init__.py").write_text(FAKE)
    (package / "backend" / "__init__.py").touch()
    (package / "backend" / "backend_ga4.py").touch()
    environment = {n: v for n, v in os.environ.items() if n not in (ASK, "ORT_DISABLE_TELEMETRY")}
    environment |= {"PYTHONPATH": str(tmp_path), **({ASK: "1"} if asked else {})}
    ran = subprocess.run(
        [sys.executable, "-c", USE], env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert (package / "sent").exists() == asked
    # ONNX Runtime reads this when it is loaded, and so do the processes that are started.
    assert ran.stdout.split() == ["None" if asked else "1"]


def test_what_the_user_set_stays() -> None:
    code = "import os; os.environ['ORT_DISABLE_TELEMETRY'] = '0'; import freewheel"
    code += "; assert os.environ['ORT_DISABLE_TELEMETRY'] == '0'"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
