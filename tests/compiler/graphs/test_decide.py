# SPDX-License-Identifier: Apache-2.0
"""Decide graphs take and give what the manifest lists; the laws are tested in tests/policies."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import onnx
import pytest
import torch
from torch import Tensor

from freewheel.bundle.reader import Bundle
from freewheel.compiler.graphs.decide import decide_program, write_decide_graph
from freewheel.core.errors import ExportError
from freewheel.policies import POLICIES, policy_class
from freewheel.policies.base import Decision, Policy, Step
from freewheel.policies.guard import decide_inputs, decide_outputs
from freewheel.policies.spec import HistorySpec, PolicySpec


class Eager(Policy):
    """A law that branches in Python on a tensor's value."""

    spec: ClassVar[PolicySpec] = PolicySpec(
        name="eager", summary="", signals=["temb"], history=HistorySpec(maximum=1)
    )

    def decide(
        self,
        step: Step,
        signal: Tensor,
        feature: Tensor,
        kept: dict[str, Tensor],
        state: dict[str, Tensor],
        parameters: dict[str, Tensor],
    ) -> Decision:
        compute = step.must_compute
        if bool(signal.mean() > 0):
            compute = torch.ones_like(compute)
        return Decision(compute, {})


@pytest.mark.parametrize("name", POLICIES)
def test_names_in_the_manifest_are_the_graphs(tiny_bundle: Bundle, name: str) -> None:
    entry = tiny_bundle.manifest.policies[name]
    listed = tiny_bundle.manifest.graphs[entry.graph]
    graph = onnx.load(tiny_bundle.graph_path(entry.graph)).graph
    assert [v.name for v in graph.input] == list(listed.inputs)
    assert [v.name for v in graph.output] == list(listed.outputs)
    declared = decide_inputs(policy_class(name).spec)
    assert {n: (i.dtype, tuple(i.shape)) for n, i in listed.inputs.items()} == {
        n: s for n, s in declared.items() if n in listed.inputs
    }
    assert list(listed.outputs) == list(decide_outputs(policy_class(name).spec))
    assert entry.spec == policy_class(name).spec


@pytest.mark.parametrize("name", POLICIES)
def test_every_input_of_a_graph_is_read(tiny_bundle: Bundle, name: str) -> None:
    graph = onnx.load(tiny_bundle.graph_path(f"decide.{name}")).graph
    read = {n for node in graph.node for n in node.input} | {v.name for v in graph.output}
    assert {v.name for v in graph.input} <= read
    dropped = set(decide_inputs(policy_class(name).spec)) - {v.name for v in graph.input}
    assert not dropped & {"step_index", "computed_steps", "exact", "signal"}, dropped


@pytest.mark.parametrize("name", POLICIES)
def test_no_example_size_is_left_in_a_graph(tiny_bundle: Bundle, name: str) -> None:
    graph = onnx.load(tiny_bundle.graph_path(f"decide.{name}")).graph
    open_dims = {
        v.name: [d.dim_param for d in v.type.tensor_type.shape.dim]
        for v in graph.input
        if v.name in ("signal", "previous_signal", "feature", "previous_feature")
    }
    for value, dims in open_dims.items():
        expected = (
            ["rows", "width"] if "signal" in value else ["frames", "tokens_per_frame", "channels"]
        )
        assert dims == expected


def test_a_written_graph_is_the_program(tmp_path: Path) -> None:
    (tmp_path / "graphs").mkdir()
    entry = write_decide_graph(policy_class("off")(), tmp_path)
    assert entry.file == "graphs/decide.off.onnx"
    assert entry.runs == "decide"
    model = onnx.load(tmp_path / entry.file)
    onnx.checker.check_model(model)
    assert model.graph.name == "decide.off"
    assert [v.name for v in model.graph.input] == list(entry.inputs)


def test_a_law_with_a_python_branch_is_refused_with_the_rule() -> None:
    with pytest.raises(ExportError) as caught:
        decide_program(Eager())
    assert caught.value.where == "graph 'decide.eager'"
    assert "torch could not export the policy" in caught.value.what
    assert "no Python branch on a tensor's value" in caught.value.hint
