# SPDX-License-Identifier: Apache-2.0
"""Count what a conversion holds in memory: the bytes of all weights that were read and still live."""

from __future__ import annotations

import weakref
from types import ModuleType

import pytest
from torch import Tensor

from freewheel.compiler.checkpoints.sources import Weight, read_weight


class Live:
    """Bytes of weights that live now, and the most that ever did."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *modules: ModuleType) -> None:
        self.now = self.most = self.reads = 0
        for module in modules:
            monkeypatch.setattr(module, "read_weight", self.read)

    def read(self, weight: Weight) -> Tensor:
        tensor = read_weight(weight)
        size = tensor.nbytes
        self.reads += 1
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(tensor.untyped_storage(), self.free, size)
        return tensor

    def free(self, size: int) -> None:
        self.now -= size
