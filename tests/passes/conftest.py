# SPDX-License-Identifier: Apache-2.0
"""Shared by the pass tests: graphs as ONNX text, a pass held to its contract, a graph computed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from freewheel.passes import Pass, run_passes

HEADER = '<ir_version: 10, opset_import: ["": 23]>'

Outputs = dict[str, np.ndarray]


@pytest.fixture
def parse() -> Callable[[str], ir.Model]:
    """Return a function that reads a graph written as ONNX text, naming its nodes."""

    def read(text: str) -> ir.Model:
        model = ir.from_onnx_text(HEADER + text)
        for index, node in enumerate(model.graph.all_nodes()):
            node.name = f"node_{index}"
        return model

    return read


@pytest.fixture
def rewrite() -> Callable[[ir.Model, Pass], bool]:
    """Return a function that runs a pass, holds it to its contract, and says whether it changed.

    The contract: in place or not as declared, a valid model afterwards, a truthful ``changed``,
    and idempotence.
    """

    def run(model: ir.Model, graph_pass: Pass) -> bool:
        before = text_of(model)
        model, changed = run_passes(model, [graph_pass])
        after = text_of(model)
        assert bool(changed) == (after != before)
        onnx.checker.check_model(ir.to_proto(model))
        _, again = run_passes(model, [graph_pass])
        assert again == [], "a second run reports a change"
        assert text_of(model) == after, "a second run changes the model"
        return bool(changed)

    return run


@pytest.fixture
def evaluate() -> Callable[[ir.Model, dict[str, np.ndarray]], Outputs]:
    """Return a function that computes a model's outputs with ONNX's reference implementation."""

    def run(model: ir.Model, feeds: dict[str, np.ndarray]) -> Outputs:
        proto = ir.to_proto(model)
        outputs = ReferenceEvaluator(proto).run(None, feeds)
        return dict(zip((o.name for o in proto.graph.output), outputs, strict=True))

    return run


def text_of(model: ir.Model) -> str:
    """Write a model as text, without inferred types of inner values: no rewrite, if they come."""
    proto = ir.to_proto(model)
    del proto.graph.value_info[:]
    return str(proto)
