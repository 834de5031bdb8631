# SPDX-License-Identifier: Apache-2.0
"""The two graphs of caching: residual = after − before, reused = hidden + Σ mix · history."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from freewheel.bundle.reader import Bundle
from freewheel.compiler.graphs.caching import Delta, Gram, Reuse, cache_segments
from freewheel.core.tensor_spec import TensorSpec
from freewheel.policies.decision_loop import difference_gram

HIDDEN = TensorSpec("float32", ("batch", "tokens", 6))


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@given(
    batch=st.integers(1, 3),
    tokens=st.integers(1, 7),
    slots=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_reuse_is_the_mix_of_the_history(batch: int, tokens: int, slots: int, seed: int) -> None:
    hidden, history = (
        random(batch, tokens, 6, seed=seed),
        random(slots, batch, tokens, 6, seed=seed + 1),
    )
    mix = random(slots, seed=seed + 2)
    found = Reuse()(*(torch.from_numpy(a) for a in (hidden, history, mix))).numpy()
    expected = hidden.astype(np.float64)
    for factor, residual in zip(mix, history, strict=True):
        expected = expected + float(factor) * residual
    assert relative(found, expected) < 1e-6


def test_a_residual_put_back_gives_what_the_body_gave() -> None:
    before, after = random(2, 5, 6), random(2, 5, 6, seed=1)
    residual = Delta(torch.float32)(torch.from_numpy(after), torch.from_numpy(before))
    history = torch.stack([residual, torch.full_like(residual, 7.0)])
    found = Reuse()(torch.from_numpy(before), history, torch.tensor([1.0, 0.0]))
    assert relative(found.numpy(), after) < 1e-6


def test_history_in_bfloat16_is_mixed_in_float32() -> None:
    history = torch.from_numpy(random(3, 1, 4, 6)).to(torch.bfloat16)
    mix = torch.tensor([3.0, -3.0, 1.0])
    hidden = torch.from_numpy(random(1, 4, 6, seed=1)) * 1e-3
    found = Reuse()(hidden, history, mix)
    expected = hidden.double() + (mix.double()[:, None, None, None] * history.double()).sum(0)
    assert found.dtype == torch.float32
    # bfloat16 sums would be off by 4e-3.
    assert relative(found.numpy(), expected.numpy()) < 1e-6


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_segments_are_declared_for_any_hidden_states(dtype: str) -> None:
    delta, reuse, gram, probe = cache_segments({"hidden": HIDDEN}, dtype)
    assert (probe.name, probe.runs) == ("first_block_residual", "probe")
    assert probe.outputs["first_block_residual"].dtype == "float32"
    assert (delta.name, delta.runs, reuse.name, reuse.runs) == (
        "delta",
        "computed",
        "reuse",
        "reused",
    )
    assert delta.outputs == {"residual": TensorSpec(dtype, HIDDEN.shape)}
    assert reuse.inputs["history"] == TensorSpec(dtype, ("slots", *HIDDEN.shape))
    assert reuse.inputs["mix"] == TensorSpec("float32", ("slots",))
    assert reuse.outputs == {"hidden_out": HIDDEN}
    assert (gram.name, gram.runs, gram.inputs["history"]) == (
        "gram",
        "computed",
        reuse.inputs["history"],
    )
    assert (
        gram.inputs["factors"] == gram.outputs["gram"] == TensorSpec("float32", ("slots", "slots"))
    )
    residual = delta.module(torch.ones(1, 2, 6), torch.zeros(1, 2, 6))
    assert str(residual.dtype) == f"torch.{dtype}"


def test_gram_multiplies_differences_that_float32_products_would_lose() -> None:
    first = torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(0)) + 100
    second = first + 1e-3 * torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(1))
    found = Gram()(torch.stack([first, second]), torch.tensor([[0.0, 1.0], [-1.0, 1.0]]))
    assert found.shape == (2, 2)
    np.testing.assert_allclose(found, difference_gram([second, first], 2), rtol=1e-5)
    plain = torch.stack([first, second]).flatten(1)
    products = plain @ plain.T / plain.shape[1]
    lost = products[0, 0] + products[1, 1] - 2 * products[0, 1]
    assert abs(float(lost) / float(found[1, 1]) - 1) > 0.5


@pytest.mark.parametrize(("batch", "tokens", "slots"), [(1, 3, 1), (2, 9, 5)])
def test_graphs_of_a_bundle_compute_the_same(
    tiny_bundle: Bundle, batch: int, tokens: int, slots: int
) -> None:
    channels = 32
    before, after = random(batch, tokens, channels), random(batch, tokens, channels, seed=1)
    delta = ReferenceEvaluator(onnx.load(tiny_bundle.graph_path("delta")))
    (residual,) = delta.run(None, {"hidden_out": after, "hidden": before})
    np.testing.assert_array_equal(residual, after - before)
    history, mix = random(slots, batch, tokens, channels, seed=2), random(slots, seed=3)
    reuse = ReferenceEvaluator(onnx.load(tiny_bundle.graph_path("reuse")))
    (found,) = reuse.run(None, {"hidden": before, "history": history, "mix": mix})
    expected = before + np.einsum("k,kbtc->btc", mix.astype(np.float64), history)
    assert relative(found, expected) < 1e-6
