# SPDX-License-Identifier: Apache-2.0
"""What is computed between equal blocks is a part of them, where it is the same before each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from freewheel.compiler.cut.cut import cut_model
from freewheel.compiler.cut.prove import chain
from freewheel.compiler.cut.row import Row, prompt, step
from freewheel.compiler.cut.words import Cut

BLOCKS = 4
ROW = Row("Scaled", {"x": step("batch tokens 4"), "scales": prompt(f"batch {BLOCKS} 4")})


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return x + nn.functional.scaled_dot_product_attention(
            self.query(x), self.key(x), self.value(x)
        )


class Scaled(nn.Module):
    """Before each block the stream is multiplied by a vector of the prompt."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(BLOCKS)])
        self.own = nn.Linear(4, 4)

    @classmethod
    def from_config(cls, config: object) -> Scaled:
        return cls()

    def forward(self, x: Tensor, scales: Tensor, *, return_dict: bool) -> Tensor:
        x = x.sin()
        for i, block in enumerate(self.blocks):
            x = block(self.before(x, scales[:, i], i))
        return x.cos()

    def before(self, x: Tensor, scale: Tensor, i: int) -> Tensor:
        return x * scale.unsqueeze(1)


class Once(Scaled):
    """One block has nothing before it."""

    def before(self, x: Tensor, scale: Tensor, i: int) -> Tensor:
        return x if i == 2 else super().before(x, scale, i)


class Otherwise(Scaled):
    """One block has another operation before it."""

    def before(self, x: Tensor, scale: Tensor, i: int) -> Tensor:
        return x + scale.unsqueeze(1) if i == 2 else super().before(x, scale, i)


class Weighted(Scaled):
    """What is before blocks multiplies by a weight that is none of theirs."""

    def before(self, x: Tensor, scale: Tensor, i: int) -> Tensor:
        return x * self.own.bias * scale.unsqueeze(1)


class ReadAgain(Scaled):
    """What is behind the blocks reads what was before the last."""

    def forward(self, x: Tensor, scales: Tensor, *, return_dict: bool) -> Tensor:
        x = x.sin()
        for i, block in enumerate(self.blocks):
            scaled = self.before(x, scales[:, i], i)
            x = block(scaled)
        return x.cos() + scaled


def checked(model_class: Any) -> Cut:
    """Cut a model, and hold the cut to it."""
    cut = cut_model(ROW, model_class, {})
    model = model_class()
    given = {"x": torch.randn(3, 5, 4), "scales": torch.randn(3, BLOCKS, 4)}
    found = chain(cut, dict(model.named_parameters()), given)[0]
    assert torch.allclose(found, model(**given, return_dict=False), atol=1e-5)
    return cut


def test_what_is_the_same_before_each_block_is_the_blocks() -> None:
    cut = checked(Scaled)
    assert not [name for name in cut.segments if name.startswith("bridge")]
    blocks = [c for c in cut.calls if c.block]
    assert [c.block for c in blocks] == [f"blocks.{i}" for i in range(BLOCKS)]
    assert len({c.segment for c in blocks}) == 1


@pytest.mark.parametrize("model_class", [Once, Otherwise, Weighted, ReadAgain])
def test_what_is_not_stays_between(model_class: Any) -> None:
    assert [name for name in checked(model_class).segments if name.startswith("bridge")]
