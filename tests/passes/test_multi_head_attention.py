# SPDX-License-Identifier: Apache-2.0
"""The contributed operator attends as ONNX's Attention does, in memory that grows with tokens."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from freewheel.passes import MultiHeadAttention

ATTENTION = """
g (float[b, 3, s, 8] q, float[b, 3, t, 8] k, float[b, 3, t, 8] v)
=> (float[b, 3, s, 8] y) <float[b, 3, s, 8] a> {
    a = Attention(q, k, v)
    y = Neg(a)
}
"""


def run(model: ir.Model, feeds: dict[str, np.ndarray]) -> np.ndarray:
    content = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, feeds)[0])


def feeds(batch: int, queries: int, keys: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(queries * 100 + keys)
    shapes = {"q": queries, "k": keys, "v": keys}
    return {
        n: random.standard_normal((batch, 3, s, 8)).astype(np.float32) for n, s in shapes.items()
    }


@pytest.mark.parametrize("scale", [None, 0.5])
@pytest.mark.parametrize(("batch", "queries", "keys"), [(1, 1, 1), (1, 40, 40), (2, 33, 7)])
def test_it_attends_as_the_standard_operator(parse, rewrite, scale, batch, queries, keys) -> None:
    attributes = "" if scale is None else f"<scale = {scale}>"
    model = parse(ATTENTION.replace("Attention", f"Attention{attributes}"))
    values = feeds(batch, queries, keys)
    scores = values["q"] @ values["k"].swapaxes(-1, -2) * (scale or 8**-0.5)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = -(weights / weights.sum(-1, keepdims=True)) @ values["v"]
    assert rewrite(model, MultiHeadAttention())
    assert "Attention" not in [n.op_type for n in model.graph]
    np.testing.assert_allclose(run(model, values), expected, rtol=1e-5, atol=1e-6)


def test_a_graph_output_keeps_its_name(parse, rewrite) -> None:
    text = ATTENTION.replace("y = Neg(a)", "").replace("a = ", "y = ")
    model = parse(text.replace("<float[b, 3, s, 8] a>", ""))
    assert rewrite(model, MultiHeadAttention())
    assert [v.name for v in model.graph.outputs] == ["y"]


@pytest.mark.parametrize(
    "text",
    [
        ATTENTION.replace("Attention", "Attention<is_causal = 1>"),
        ATTENTION.replace("3, s, 8] q", "h, s, 8] q"),
        ATTENTION.replace("] v)", "] v, float[s, t] m)").replace("k, v)\n", "k, v, m)\n"),
    ],
    ids=["causal", "heads unknown", "mask"],
)
def test_other_forms_stay(parse, rewrite, text) -> None:
    assert not rewrite(parse(text), MultiHeadAttention())


PEAK = """
import sys
import numpy, onnxruntime
def peak():  # in kB; a child's ru_maxrss would start at its parent's
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1  # each thread has a buffer of its own
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
values = {n: numpy.ones((1, 3, 6000, 8), numpy.float32) for n in "qkv"}
before = peak()
session.run(None, values)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_scores_are_written_out(parse, rewrite, tmp_path: Path) -> None:
    model = parse(ATTENTION)
    peaks = {}
    for name in ("standard", "contributed"):
        path = tmp_path / f"{name}.onnx"
        ir.save(model, path)
        done = subprocess.run(
            [sys.executable, "-c", PEAK, path], capture_output=True, text=True, check=True
        )
        peaks[name] = int(done.stdout) * 1024
        rewrite(model, MultiHeadAttention())
    scores = 3 * 6000**2 * 4
    assert peaks["standard"] > scores
    assert peaks["contributed"] < scores / 4
