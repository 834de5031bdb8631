# SPDX-License-Identifier: Apache-2.0
"""A cut's description adds up: weights, operations, stages, and what no step computes."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case, case
from torch.utils.flop_counter import FlopCounterMode

from freewheel.compiler.cut.describe import describe, describe_model
from freewheel.compiler.cut.prove import eager, random_inputs
from freewheel.compiler.cut.row import SIZES
from freewheel.compiler.draw_cut import mermaid
from freewheel.core.errors import CheckpointError


def described(one: Case) -> dict[str, Any]:
    config: Any = one.model.config
    return describe(one.cut, one.row, config)


def test_weights_and_operations_are_the_transformers(wan: Case) -> None:
    data = described(wan)
    held = [p for name, p in wan.model.named_parameters()]
    assert sum(s["weights"] for s in data["segments"]) == sum(prod(p.shape) for p in held)
    config: Any = wan.model.config
    inputs = random_inputs(wan.row, config, wan.row.sizes(config, SIZES))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        eager(wan.row, wan.model, inputs)
    assert sum(s["flops"] for s in data["segments"]) == counter.get_total_flops()


def test_stages_name_the_graphs_of_their_blocks(wan: Case) -> None:
    assert described(wan)["stages"] == [
        {"first": "blocks.0", "count": 4, "block": "block", "context": "context"}
    ]


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("flux", ("norm1.linear", "norm1_context.linear", "blocks.*.norm.linear")),
        ("qwen_image", ("img_mod", "txt_mod")),
        pytest.param("sd3", ("norm1.linear", "norm1_context.linear"), marks=pytest.mark.nightly),
    ],
)
def test_no_step_computes_adaln_of_every_block(name: str, layers: tuple[str, ...]) -> None:
    one = case(name)
    data = described(one)
    ahead = data["ahead"]["modulation"]
    wanted = [
        prod(p.shape)
        for n, p in one.model.named_parameters()
        if "blocks." in n and any(la.split("*")[-1] in n for la in layers)
    ]
    assert ahead["weights"] == sum(wanted) > 0
    share = sum(wanted) / sum(s["weights"] for s in data["segments"])
    assert ahead["weights_share"] == pytest.approx(share)


def test_values_go_from_segment_to_segment(wan: Case) -> None:
    edges = {(source, reader): names for source, reader, names in described(wan)["edges"]}
    assert edges["rotary", "block"] == ["rope_cos", "rope_sin"]
    assert edges["block", "block"] == ["hidden_states"]
    assert edges["finish", "results"] == ["output"]


@pytest.mark.nightly
def test_values_of_each_block_are_one() -> None:
    """Chroma's blocks each read two parts of the modulation, the image's and the text's."""
    data = described(case("chroma"))
    edges = {(source, reader): names for source, reader, names in data["edges"]}
    found = edges["timestep", "transformer_blocks_block"]
    assert found == ["temb of each block", "temb_2 of each block"]


def test_the_documentation_shows_wans_cut_as_it_is_drawn(wan: Case) -> None:
    page = Path(__file__).parents[3] / "docs/explanation/cutting.md"
    chart = page.read_text(encoding="utf-8").split("```mermaid\n")[1].split("\n```")[0]
    assert chart.replace("× 30", "× 4") == mermaid(described(wan))


def test_a_class_without_a_row_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"config\.json.*'WanTransformer3D' has no row.*Wan"):
        describe_model("WanTransformer3D", {}, where="config.json")
