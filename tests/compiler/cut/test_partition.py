# SPDX-License-Identifier: Apache-2.0
"""Every node goes to the segment that its dependencies send it to."""

from __future__ import annotations

import pytest
import torch
from cases import Case, case, conditioned, traced
from torch import Tensor

from freewheel.compiler.cut.classes import classify
from freewheel.compiler.cut.partition import partition
from freewheel.compiler.cut.prove import chain
from freewheel.compiler.cut.row import run, step
from freewheel.compiler.cut.tidy import tidy
from freewheel.compiler.cut.words import PRODUCTS, Segment, operation


def operations_of(segment: Segment) -> list[str]:
    nodes = segment.module.graph.nodes
    return [operation(node) for node in nodes if node.op == "call_function"]


def products_of(case: Case, segment: str) -> int:
    return sum(name in PRODUCTS for name in operations_of(case.cut.segments[segment]))


def test_wan_is_cut_where_the_hand_written_family_cut_it(wan: Case) -> None:
    runs = {name: segment.runs for name, segment in wan.cut.segments.items()}
    assert runs == {
        "rotary": "shape",
        "prompt": "prompt",
        "timestep": "run",
        "context": "context",
        "head": "step",
        "block": "block",
        "finish": "step",
    }


def test_keys_and_values_of_the_prompt_are_context(wan: Case) -> None:
    assert products_of(wan, "context") == 2
    assert (
        products_of(wan, "block") == 4 + 2 + 2 + 2
    )  # attn1, attn2 without keys and values, ffn, sdpa
    assert "layer_norm" not in operations_of(wan.cut.segments["context"])


@pytest.mark.parametrize(
    ("name", "products"),
    [
        ("flux", {"transformer_blocks": 2, "single_transformer_blocks": 1}),
        ("qwen_image", {"": 2}),
        pytest.param("sd3", {"transformer_blocks": 2}, marks=pytest.mark.nightly),
        pytest.param(
            "hunyuan_video",
            {
                "refiner_blocks": 1,
                "transformer_blocks": 2,
                "single_transformer_blocks": 1,
            },
            marks=pytest.mark.nightly,
        ),
    ],
)
def test_a_blocks_products_of_conditioning_are_modulation(
    name: str, products: dict[str, int]
) -> None:
    one = case(name)
    found = {n: products_of(one, n) for n, s in one.cut.segments.items() if s.runs == "modulation"}
    expected = {f"{path}_modulation".removeprefix("_"): n for path, n in products.items()}
    assert expected.items() <= found.items()
    for segment in (s for s in one.cut.segments.values() if s.runs == "modulation"):
        assert len(segment.outputs) == products_of(one, segment.name)


def test_scales_without_a_product_stay_in_the_block(wan: Case) -> None:
    assert "timestep_proj" in wan.cut.segments["block"].inputs
    assert "modulation" not in {segment.runs for segment in wan.cut.segments.values()}


@pytest.mark.nightly
def test_a_refiner_that_sees_the_timestep_runs_on_computed_steps() -> None:
    cut = case("hunyuan_video").cut
    path = "context_embedder.token_refiner.refiner_blocks"
    calls = [c for c in cut.calls if c.block.startswith(path)]
    blocks = [c for c in calls if cut.segments[c.segment].runs == "block"]
    assert [c.block for c in blocks] == [f"{path}.{i}" for i in range(3)]
    assert {s.name for s in cut.segments.values() if s.runs == "step"} == {"head", "finish"}
    assert products_of(case("hunyuan_video"), "head") == 1


def test_positions_of_the_prompt_make_their_tables_in_prompt() -> None:
    one = case("flux").cut
    assert "rotary" not in one.segments
    assert "hidden_states" not in one.segments["prompt"].inputs
    assert {"rope_cos", "rope_sin"} <= set(one.segments["prompt"].outputs)


def test_a_constant_of_the_batchs_size_stays_with_the_timestep() -> None:
    def forward(x: Tensor, t: Tensor) -> Tensor:
        return x + (t + torch.zeros(t.shape[0])).unsqueeze(-1)

    found = traced(forward, x=step("batch 4"), t=run("batch"))
    tidy(found)
    classes = classify(found, [])
    parts = partition(found, [], [], classes)
    assert [region.name for region in parts.regions] == ["timestep", "finish"]


def test_what_sees_timestep_and_prompt_runs_once_per_computed_step() -> None:
    """`finish`, which a reused step runs too, computes it again."""
    cut = conditioned().cut
    assert cut.segments["condition"].runs == "block"
    body = [c.segment for c in cut.calls if cut.segments[c.segment].runs == "block"]
    assert body == ["condition", *["blocks_block"] * 4] or body == ["condition", *["block"] * 4]
    finish = cut.segments["finish"]
    assert set(finish.inputs).isdisjoint(cut.segments["condition"].outputs)
    assert {n for n, _ in finish.module.named_parameters()} == {"scale.weight", "scale.bias"}


def test_a_cut_with_a_condition_is_the_model() -> None:
    one = conditioned()
    given = {"x": torch.randn(2, 5, 4), "t": torch.full((2,), 0.3), "pooled": torch.randn(2, 4)}
    found = chain(one.cut, one.weights, given)[0]
    assert torch.allclose(found, one.model(**given, return_dict=False), atol=1e-6)
