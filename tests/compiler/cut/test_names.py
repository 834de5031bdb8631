# SPDX-License-Identifier: Apache-2.0
"""Values bear the names that the model's source gives them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from cases import Case, traced
from torch import Tensor, fx, nn

from freewheel.compiler.cut.names import assignments, fresh_name, source_of, value_name
from freewheel.compiler.cut.row import Row, step
from freewheel.compiler.cut.trace import trace
from freewheel.compiler.cut.words import is_operation


def test_a_value_has_the_name_of_the_variable_it_is_assigned_to() -> None:
    def forward(x: Tensor) -> Tensor:
        doubled = torch.relu(
            x * 2,
        )
        first, second = doubled.chunk(2, dim=-1)
        return first - second

    found = traced(forward, x=step("batch 4"))
    nodes = [node for node in found.graph.nodes if is_operation(node)]
    names = [value_name(node) for node in nodes]
    assert names[:2] == ["doubled", "doubled"]
    assert names[3:5] == ["first", "second"]
    assert source_of(nodes[0]).startswith("test_names.py:")


def test_a_value_without_a_line_is_named_after_its_operation() -> None:
    graph = fx.Graph()
    node = graph.call_function(torch.ops.aten.relu.default, (graph.placeholder("x"),))
    assert value_name(node) == node.name
    assert source_of(node) == "unknown line"


def test_a_list_entrys_value_is_named_after_the_list_since_no_name_begins_with_a_digit() -> None:
    graph = fx.Graph()
    node = graph.call_function(torch.ops.aten.relu.default, (graph.placeholder("x"),))
    node.meta["nn_module_stack"] = {"entry": ("model.layers.1.0", nn.ReLU)}
    assert value_name(node) == f"layers_1_0_{node.name}"
    node.meta["nn_module_stack"] = {"entry": ("model.layers.1.norm2", nn.ReLU)}
    assert value_name(node) == f"norm2_{node.name}"


def test_lines_of_a_statement_share_its_names(tmp_path: Path) -> None:
    file = tmp_path / "model.py"
    file.write_text("a = (\n    1\n)\nb, c = 2, 3\nd.e = 4\n", encoding="utf-8")
    assert assignments(str(file)) == {1: ("a",), 2: ("a",), 3: ("a",), 4: ("b", "c")}
    assert assignments(str(tmp_path / "none.py")) == {}


def test_a_taken_name_gets_a_number() -> None:
    assert fresh_name("x", []) == "x"
    assert fresh_name("x", ["x", "x_2"]) == "x_3"


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.layer(x)
        hidden = hidden.relu()
        return hidden * 2


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = Gate()

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Model:
        return cls()

    def forward(self, x: Tensor, return_dict: bool) -> Tensor:
        gated = self.gate(x)
        return gated + x


def test_a_modules_result_is_named_by_its_caller_and_the_rest_by_itself() -> None:
    found = trace(Row("Model", {"x": step("batch 4")}), Model, {})
    names = [value_name(node) for node in found.graph.nodes if is_operation(node)]
    assert names[:3] == ["hidden", "hidden", "gated"]
    assert "results" not in names


def test_wan_values_are_named_as_in_its_forward(wan: Case) -> None:
    block = wan.cut.segments["block"]
    assert {"hidden_states", "timestep_proj"} <= set(block.inputs)
    assert block.outputs == ("hidden_states",)
