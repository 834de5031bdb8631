# SPDX-License-Identifier: Apache-2.0
"""What TensorRT says while it works: faults, the layers it made, the memory they take.

On a machine without a GPU a plan can't be deserialised and inspected; the log has the same facts.
"""

from __future__ import annotations

import re
import threading
from typing import Any

__all__ = ["Journal", "fault_recorder"]

HOUSEKEEPING = {"shape_call", "signal", "wait"}  # Layers that compute nothing.
LAYER = re.compile(r"^Name: (.*?), LayerType: (\w+),.*?(?:TacticName: ([^,]*),.*?)?Metadata: (.*)$")
SILENT = "TensorRT refuses it and gives no reason"


class Journal:
    """Mixin of TensorRT's logger that keeps what a build said about faults, layers and memory."""

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
            self.activation_bytes = max(self.activation_bytes or 0, int(message.split()[3]))
        elif message.startswith("Layers:"):
            matches = (LAYER.match(line) for line in message.splitlines())
            self.layers += [_layer(m) for m in matches if m and m[2] not in HOUSEKEEPING]

    def fault(self) -> str:
        """Say in one line what TensorRT complained about, in its order."""
        return one_line(self.errors)


def fault_recorder(trt: Any) -> Any:
    """Make an `IErrorRecorder` that keeps what TensorRT complained about while it ran.

    At run time the logger is TensorRT's own: its compile threads log at every severity, and a logger
    in Python would make each of them wait for the interpreter's lock, which a call that waits for
    the threads may hold. An error recorder is called for errors alone.
    """

    class FaultRecorder(trt.IErrorRecorder):  # type: ignore[misc]  # trt is untyped
        def __init__(self) -> None:
            trt.IErrorRecorder.__init__(self)
            self._faults: list[tuple[Any, str]] = []
            self._lock = threading.Lock()

        def report_error(self, code: Any, description: str) -> bool:
            with self._lock:
                self._faults.append((code, description))
            return False  # nobody needs to be unwound: calls say themselves that they failed

        def get_num_errors(self) -> int:
            return len(self._faults)

        def get_error_code(self, index: int) -> Any:
            return self._faults[index][0]

        def get_error_desc(self, index: int) -> str:
            return self._faults[index][1]

        def has_overflowed(self) -> bool:
            return False

        def clear(self) -> None:
            with self._lock:
                self._faults.clear()

        def take(self) -> str:
            """Say in one line what was complained about since this was asked last."""
            with self._lock:
                told = [text for _, text in self._faults]
                self._faults.clear()
            return one_line(told)

    return FaultRecorder()


def one_line(faults: list[str]) -> str:
    """Join complaints, each once and without its line breaks."""
    return "; ".join(dict.fromkeys(" ".join(f.split()) for f in faults)) or SILENT


def _layer(match: re.Match[str]) -> dict[str, Any]:
    name, kind, kernel, metadata = match.groups()
    nodes = re.findall(r"\[ONNX Layer: ([^\]]*)\]", metadata)
    return {"name": name, "type": kind, "kernel": kernel or "", "nodes": nodes}
