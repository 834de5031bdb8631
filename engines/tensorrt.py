# SPDX-License-Identifier: Apache-2.0
"""TensorRT and TensorRT-RTX."""

from __future__ import annotations

from typing import ClassVar

import torch

from .base import Availability


class TensorRT:
    """Placeholder until the backend lands."""

    name: ClassVar[str] = "tensorrt"
    precisions: ClassVar[tuple[str, ...]] = ("float32", "bfloat16", "float16")
    device = torch.device("cuda")

    @classmethod
    def probe(cls) -> Availability:
        """Say that it is not there yet."""
        return Availability(False, "not built into this version yet")


class TensorRTRTX(TensorRT):
    """Placeholder until the backend lands."""

    name: ClassVar[str] = "tensorrt-rtx"
