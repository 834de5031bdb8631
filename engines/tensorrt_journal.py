# SPDX-License-Identifier: Apache-2.0
"""What TensorRT says while it works: faults, the layers it made, the memory they take.

On a machine without a GPU a plan can't be deserialised and inspected; the log has the same facts.
"""

from __future__ import annotations

import re
from typing import Any

__all__ = ["Journal"]

HOUSEKEEPING = {"shape_call", "signal", "wait"}  # Layers that compute nothing.
LAYER = re.compile(r"^Name: (.*?), LayerType: (\w+),.*?(?:TacticName: ([^,]*),.*?)?Metadata: (.*)$")


class Journal:
    """Mixin of TensorRT's logger that keeps what was said about faults, layers and memory."""

    errors: list[str]
    layers: list[dict[str, Any]]
    activation_bytes: int | None

    @staticmethod
    def of(trt: Any) -> Any:
        """Make a logger of ``trt`` that is a journal."""

        class TensorRTJournal(Journal, trt.ILogger):  # type: ignore[misc]  # trt is untyped
            def __init__(self) -> None:
                trt.ILogger.__init__(self)
                self.errors, self.layers, self.activation_bytes = [], [], None

            def log(self, severity: Any, message: str) -> None:
                self.note(severity.name, message)

        return TensorRTJournal()

    def note(self, severity: str, message: str) -> None:
        """Keep one message, if it tells anything."""
        if severity in ("ERROR", "INTERNAL_ERROR"):
            self.errors.append(message)
        elif message.startswith("Total Activation Memory: "):
            self.activation_bytes = int(message.split()[3])
        elif message.startswith("Layers:"):
            matches = (LAYER.match(line) for line in message.splitlines())
            self.layers += [_layer(m) for m in matches if m and m[2] not in HOUSEKEEPING]

    def fault(self) -> str:
        """Say in one line what TensorRT complained about last."""
        if not self.errors:
            return "TensorRT refuses it and gives no reason"
        return " ".join(self.errors[0].split())


def _layer(match: re.Match[str]) -> dict[str, Any]:
    name, kind, kernel, metadata = match.groups()
    nodes = re.findall(r"\[ONNX Layer: ([^\]]*)\]", metadata)
    return {"name": name, "type": kind, "kernel": kernel or "", "nodes": nodes}
