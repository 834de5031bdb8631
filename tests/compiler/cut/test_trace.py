# SPDX-License-Identifier: Apache-2.0
"""Tracing: what is traced of a transformer, what it costs, what it takes for granted."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import Case, run, traced
from torch import nn

from freewheel.compiler.cut.row import Row, step
from freewheel.compiler.cut.trace import trace
from freewheel.core.errors import ExportError


def test_the_domain_has_the_length_of_tables_over_the_rows_sizes(wan: Case) -> None:
    limits = {str(assumption.condition) for assumption in wan.cut.domain}
    assert {"frames <= 32", "height <= 65", "width <= 65"} <= limits


def test_what_cant_be_traced_is_refused_by_name() -> None:
    class Model(nn.Module):
        @classmethod
        def from_config(cls, config: dict[str, object]) -> nn.Module:
            return cls()

        def forward(self, x: torch.Tensor, return_dict: bool = False) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(ExportError, match=r"transformer 'Model': torch can't trace its forward"):
        trace(Row("Model", {"x": step("batch tokens")}), Model, {})


def written_in_turn(x: torch.Tensor) -> torch.Tensor:
    y = torch.empty_like(x)
    y[..., 0::2], y[..., 1::2] = x[..., 1::2].neg(), x[..., 0::2]
    return y.mul_(2).unflatten(-1, (2, -1)).transpose(1, 2).flatten(2)


def written_into_a_constant(x: torch.Tensor) -> torch.Tensor:
    scale = TABLE.clone()
    scale[1:].add_(3)
    return x * scale


TABLE = torch.arange(4.0)


@pytest.mark.parametrize("forward", [written_in_turn, written_into_a_constant])
def test_what_writes_in_place_is_traced_as_what_writes_nowhere(
    forward: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    found = traced(forward, x=step("batch tokens 4"))
    schemas = [getattr(node.target, "_schema", None) for node in found.graph.nodes]
    assert not any(schema.is_mutable for schema in schemas if schema is not None)
    given = torch.randn(3, 5, 4)
    assert torch.equal(run(found, x=given), forward(given))


def test_what_writes_into_its_own_values_is_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", None)
    assert traced(written_in_turn, x=step("batch tokens 4")).results
