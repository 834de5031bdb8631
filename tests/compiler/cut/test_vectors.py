# SPDX-License-Identifier: Apache-2.0
"""A timestep's vector is spread over no tokens where arithmetic makes up for it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import run, traced
from torch import Tensor

from freewheel.compiler.cut.row import run as timestep
from freewheel.compiler.cut.row import step
from freewheel.compiler.cut.tidy import tidy
from freewheel.compiler.cut.vectors import spread_no_vectors
from freewheel.compiler.cut.words import is_operation, operation

X = step("batch tokens 4")


def rewritten(forward: Callable[[Tensor, Tensor], Tensor]) -> list[str]:
    """Rewrite a function of latents and timestep, check it, and name its operations."""
    found = traced(forward, x=X, t=timestep())
    tidy(found)
    spread_no_vectors(found)
    found.graph.lint()
    for batch, tokens in ((2, 5), (3, 1), (1, 7)):
        x, t = torch.randn(batch, tokens, 4), torch.randn(batch)
        assert torch.allclose(run(found, x=x, t=t), forward(x, t))
    return [operation(node) for node in found.graph.nodes if is_operation(node)]


def spread(x: Tensor, t: Tensor) -> Tensor:
    vector = t[:, None, None] * torch.arange(8.0)
    return vector.expand(x.shape[0], x.shape[1], 8)


def test_modulation_of_every_token_is_computed_of_one_vector() -> None:
    def forward(x: Tensor, t: Tensor) -> Tensor:
        scale, shift = spread(x, t).cumsum(1).chunk(2, dim=-1)
        return x * (1 + torch.nn.functional.silu(scale)) + shift

    def plain(x: Tensor, t: Tensor) -> Tensor:
        scale, shift = torch.nn.functional.silu(spread(x, t)).chunk(2, dim=-1)
        return x * (1 + scale) + shift

    assert "expand" not in rewritten(plain)
    assert "expand" in rewritten(forward)


def test_a_timestep_of_each_frame_is_read_of_one() -> None:
    def forward(x: Tensor, t: Tensor) -> Tensor:
        each = t.unsqueeze(-1).expand(-1, x.shape[1])
        return x * each[:, 0].sin()[:, None, None]

    assert "expand" not in rewritten(forward)


@pytest.mark.parametrize(
    "forward",
    [
        lambda x, t: torch.cat([x, spread(x, t)], dim=-1),
        lambda x, t: x + spread(x, t).sum(1, keepdim=True)[..., :4],
        lambda x, t: spread(x, t)[..., :4] * 2,
    ],
    ids=["joined", "summed", "returned"],
)
def test_what_needs_every_token_keeps_them(forward: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert "expand" in rewritten(forward)
