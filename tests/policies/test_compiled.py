# SPDX-License-Identifier: Apache-2.0
"""Every guarded policy, compiled by ONNX Runtime and OpenVINO, decides as the eager law."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import openvino
import pytest
import torch
from runs import TIE, fold, random_run
from settings import SETTINGS

from freewheel.bundle.store import Store
from freewheel.compiler.engines import STORE
from freewheel.compiler.graphs.decide import write_decide_graph
from freewheel.core.errors import ExportError
from freewheel.policies import POLICIES, policies, policy_class
from freewheel.policies.base import Decision, Policy
from freewheel.policies.decision_loop import DecisionLoop
from freewheel.policies.guard import decide_inputs, decide_outputs

Tensors = Mapping[str, torch.Tensor]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    (folder / "graphs").mkdir()
    return folder


@pytest.fixture(scope="module")
def entries(bundle: Path, build_cache: Path) -> dict:
    named = policies(setting.policy for setting in SETTINGS.values())
    store = Store(build_cache / STORE)
    return {name: write_decide_graph(policy(), bundle, store) for name, policy in named.items()}


def with_onnxruntime(graph: Path) -> Callable[[Tensors], Tensors]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    outputs = [o.name for o in session.get_outputs()]

    def decide(inputs: Tensors) -> Tensors:
        results = session.run(outputs, {n: inputs[n].numpy() for n in names})
        return {n: torch.as_tensor(r) for n, r in zip(outputs, results, strict=True)}

    return decide


def with_openvino(graph: Path) -> Callable[[Tensors], Tensors]:
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = openvino.Core().compile_model(graph, "CPU", options)
    names = [i.any_name for i in compiled.inputs]

    def decide(inputs: Tensors) -> Tensors:
        results = compiled({n: inputs[n].numpy() for n in names})
        return {o.any_name: torch.as_tensor(np.array(results[o])) for o in compiled.outputs}

    return decide


RUNTIMES = {"onnxruntime": with_onnxruntime, "openvino": with_openvino}


@pytest.fixture(scope="module")
def compiled(bundle: Path, entries: dict) -> dict[tuple[str, str], Callable[[Tensors], Tensors]]:
    return {
        (policy, runtime): load(bundle / entry.file)
        for policy, entry in entries.items()
        for runtime, load in RUNTIMES.items()
    }


@cache
def eager_runs(name: str) -> list[tuple[Any, list[Any]]]:
    """Return runs, and what the eager law decides in each, once for both runtimes."""
    found = []
    for seed, steps in enumerate((9, 30, 30, 50)):
        run = random_run(seed, steps, frames=1 + seed, change=[0.02, 0.05, 0.1][seed % 3])
        found.append((run, list(fold(DecisionLoop.eager(SETTINGS[name], step_count=steps), run))))
    return found


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("name", SETTINGS)
def test_compiled_policy_decides_as_the_eager_law(compiled, name: str, runtime: str) -> None:
    setting = SETTINGS[name]
    for run, decided in eager_runs(name):
        graph = DecisionLoop(
            policy_class(setting.policy).spec,
            compiled[setting.policy, runtime],
            setting,
            step_count=len(decided),
        )
        threshold = setting.parameters.get("threshold", 1.0)
        for expected, found in zip(decided, fold(graph, run), strict=True):
            if found.compute != expected.compute:
                near = max(found.distance or 0, expected.distance or 0)
                assert abs(near - threshold) <= TIE * threshold
                break
            np.testing.assert_allclose(found.mix, expected.mix, rtol=1e-5, atol=1e-5)
            if expected.distance is not None:
                assert found.distance == pytest.approx(expected.distance, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["tea", "custom", "ada_plain", "easy", "firstblock"])
def test_compiled_policy_computes_on_broken_tensors(compiled, name, runtime, value) -> None:
    setting, run = SETTINGS[name], random_run(1, 24, change=0.01)
    run["signal"][7, 1, 3] = run["feature"][1, 0, 2, 1] = value
    eager = DecisionLoop.eager(setting, step_count=24)
    graph = DecisionLoop(eager.spec, compiled[setting.policy, runtime], setting, step_count=24)
    expected, found = fold(eager, run), fold(graph, run)
    assert [r.compute for r in found] == [r.compute for r in expected]
    broken = 2 if name == "ada_plain" else 7
    assert found[broken].compute


@pytest.mark.parametrize("name", [*POLICIES, "teacache+spectrum", "firstblock+dmd"])
def test_manifest_entry_names_exactly_the_graphs_interface(bundle, entries, name: str) -> None:
    entry, spec = entries[name], policy_class(name).spec
    graph = ir.load(bundle / entry.file).graph
    for values, described in ((graph.inputs, entry.inputs), (graph.outputs, entry.outputs)):
        assert {v.name: [str(d) for d in v.shape] for v in values} == {
            n: [str(d) for d in e.shape] for n, e in described.items()
        }
    assert list(entry.outputs) == list(decide_outputs(spec))
    assert set(entry.inputs) <= set(decide_inputs(spec))
    read = set(spec.parameters) - {spec.first_blocks, spec.last_blocks}  # these divide the body
    assert {f"param.{n}" for n in read} <= set(entry.inputs)
    assert all(v.uses() for v in graph.inputs)


def test_graphs_are_small_and_name_no_path(bundle: Path, entries: dict) -> None:
    here = str(Path(__file__).parents[2]).encode()
    for entry in entries.values():
        content = (bundle / entry.file).read_bytes()
        assert len(content) < 64_000
        assert here not in content


def test_policy_that_branches_on_a_value_is_refused_with_what_to_do() -> None:
    class Branching(Policy):
        spec = policy_class("off").spec

        def decide(self, step, signal, feature, kept, state, parameters) -> Decision:
            compute = step.must_compute if step.step_index > 3 else ~step.must_compute
            return Decision(compute, {})

    with pytest.raises(ExportError, match=r"(?s)'decide.off'.*could not export.*no Python branch"):
        write_decide_graph(Branching(), Path())
