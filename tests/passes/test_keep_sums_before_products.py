# SPDX-License-Identifier: Apache-2.0
"""A sum that a product follows stays a sum on OpenVINO, to the last digit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from freewheel.engines import backend
from freewheel.engines.base import Target
from freewheel.passes import KeepSumsBeforeProducts

ANGLES = """
g (float[n, 1] x) => (float[n, 2] y) <float[n, 1] part, float[n, 1] less> {
    twenty = Constant<value = float {20.0}>()
    one = Constant<value = float {1.0}>()
    frequencies = Constant<value = float[2] {1.5707964, 15707.963}>()
    part = Mul(x, twenty)
    less = Sub(part, one)
    y = Mul(less, frequencies)
}
"""


def test_engines_give_the_same_angle(parse, rewrite, tmp_path: Path) -> None:
    model = parse(ANGLES)
    assert rewrite(model, KeepSumsBeforeProducts())
    ir.save(model, tmp_path / "angles.onnx")
    openvino = backend("openvino")
    openvino.compile(tmp_path / "angles.onnx", Target(), tmp_path / "engine")
    feeds = torch.cat([torch.arange(41.0) / 800, torch.full((41,), torch.nan)])[:, None]
    found = torch.zeros(82, 2)
    openvino.load(tmp_path / "engine").bind({"x": feeds, "y": found}).run()
    expected = (feeds * 20 - 1) * torch.tensor([1.5707964, 15707.963])
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_the_graph_computes_what_it_did(parse, rewrite, evaluate) -> None:
    feeds = {"x": np.array([[0.0], [3.5], [np.inf], [-np.inf], [np.nan]], np.float32)}
    expected = evaluate(parse(ANGLES), feeds)["y"]
    model = parse(ANGLES)
    assert rewrite(model, KeepSumsBeforeProducts())
    np.testing.assert_array_equal(evaluate(model, feeds)["y"], expected)


@pytest.mark.parametrize(
    "text",
    [
        "g (float[n] x, float[n] z) => (float[n] y) <float[n] s> { s = Add(x, z) y = Mul(s, x) }",
        "g (float[n] x, float[n] z) => (float[n] y) <float[n] s> "
        "{ c = Constant<value = float {2.0}>() s = Add(x, c) y = Mul(s, z) }",
        "g (double[n] x) => (double[n] y) <double[n] s> "
        "{ c = Constant<value = double {2.0}>() s = Add(x, c) y = Mul(s, c) }",
    ],
    ids=["a sum of two values", "a product of two values", "another dtype"],
)
def test_other_sums_stay(parse, rewrite, text: str) -> None:
    assert not rewrite(parse(text), KeepSumsBeforeProducts())
