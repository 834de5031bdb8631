# SPDX-License-Identifier: Apache-2.0
"""A policy cut at its sums over tokens decides as it did."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from freewheel.compiler.graphs.decide import write_decide_graph
from freewheel.compiler.sequence.measures import measured_graphs, write_measured_graphs
from freewheel.policies import POLICIES, policy_class

MEASURED = (
    "adacache",
    "custom",
    "dbcache",
    "dicache",
    "dualblock",
    "firstblock",
    "sencache",
    "seacache",
    "teacache",
)
PARTS = 2


def _run(file: Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(str(file))
    given = {v.name: inputs[v.name] for v in session.get_inputs()}
    names = [v.name for v in session.get_outputs()]
    return dict(zip(names, session.run(None, given), strict=True))


@pytest.mark.parametrize("name", MEASURED)
def test_sums_of_parts_decide_as_the_whole(name: str, tmp_path: Path) -> None:
    (tmp_path / "graphs").mkdir()
    policy = policy_class(name)()
    entry = write_decide_graph(policy, tmp_path)
    cut = write_measured_graphs(name, policy, tmp_path)
    measure, decide = (tmp_path / cut[graph].file for graph in measured_graphs(name))
    random = np.random.default_rng(0)
    sizes = {"rows": 6, "width": 4, "frames": 3, "tokens_per_frame": 2, "channels": 4}
    kinds = {"float32": np.float32, "int64": np.int64, "bool": np.bool_}
    inputs, tokens = {}, []
    for given, io in entry.inputs.items():
        shape = [sizes[d] if isinstance(d, str) else d for d in io.shape]
        inputs[given] = np.asarray(2 * random.random(shape) + 0.5, kinds[io.dtype])
        if any(isinstance(d, str) for d in io.shape):
            tokens.append(given)
    free = {"exact": False, "step_index": 5, "step_count": 20, "param.threshold": 100.0}
    free["param.channel_stride"] = 2
    free |= {n: 0 for n in inputs if n.startswith("guard.")}
    inputs |= {n: np.asarray(v, inputs[n].dtype) for n, v in free.items() if n in inputs}
    expected = _run(tmp_path / entry.file, inputs)
    axis = -1 if "feature" in tokens else 0
    parts = [
        _run(measure, {**inputs, **{n: np.array_split(inputs[n], PARTS, axis)[i] for n in tokens}})
        for i in range(PARTS)
    ]
    joined = {
        n: np.asarray(sum(p[n] for p in parts) / (PARTS if n.startswith("mean") else 1), np.float32)
        for n in parts[0]
    }
    found = _run(decide, {**inputs, **joined})
    assert found.keys() == expected.keys()
    for output, wanted in expected.items():
        np.testing.assert_allclose(found[output], wanted, rtol=1e-5, atol=1e-6)


def test_policies_that_look_at_no_tokens_have_no_sums(tmp_path: Path) -> None:
    (tmp_path / "graphs").mkdir()
    others = [n for n in POLICIES if n not in MEASURED]
    assert [n for n in others if write_measured_graphs(n, policy_class(n)(), tmp_path)] == []
