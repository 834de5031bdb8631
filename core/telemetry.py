# SPDX-License-Identifier: Apache-2.0
"""Keep the telemetry of OpenVINO and ONNX Runtime off unless a user asks for it.

Importing OpenVINO's Python package sends an event to its maker; ONNX Runtime sends events of every
session. Both begin with the import, so that this comes before the first one.
"""

from __future__ import annotations

import os
import sys

__all__ = ["ASK", "turn_off"]

ASK = "FREEWHEEL_VENDOR_TELEMETRY"
"""Environment variable: 1 leaves both packages as their makers ship them."""


def turn_off() -> None:
    """Turn both off, in this process and, for ONNX Runtime, in those that it starts.

    A process that imported OpenVINO before Freewheel has sent OpenVINO's event already.
    """
    if os.environ.get(ASK) == "1":
        return
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    # OpenVINO has no switch; where its telemetry package can't be imported, it takes an empty one.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # None: ImportError
