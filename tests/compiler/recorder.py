# SPDX-License-Identifier: Apache-2.0
"""Backends that compile nothing and remember what they were asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar

import onnx
import torch

from freewheel.core.errors import BuildError
from freewheel.engines import Target


class Recorder:
    """A backend that compiles a graph into a file with its name, precision and operators."""

    name: ClassVar[str] = "onnxruntime"
    precisions: ClassVar[tuple[str, ...]] = ("float32",)
    device = torch.device("cpu")

    def __init__(self, refuses: str = "") -> None:
        self.refuses = refuses
        self.compiled: list[str] = []

    def compiler_version(self) -> str:
        return f"recorder {self.refuses}"

    def takes_float8(self, target: Target) -> bool:
        return True

    def compile(self, graph: Path, target: Target, out: Path) -> None:
        if self.refuses and graph.name.startswith(self.refuses):
            raise BuildError(f"graph '{graph.name}'", "is refused", "take another backend")
        self.compiled.append(graph.name)
        operators = sorted({n.op_type for n in onnx.load(graph).graph.node})
        out.write_text(json.dumps([graph.name, target.precision, operators]))


class OpenVinoRecorder(Recorder):
    name: ClassVar[str] = "openvino"
