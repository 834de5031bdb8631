# SPDX-License-Identifier: Apache-2.0
"""One cut of each small model, shared by all tests of the cutter."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property, partial
from types import SimpleNamespace
from typing import Any

import diffusers
from diffusers.models.transformers import transformer_cosmos
from held_out import HELD_OUT
from small_configs import CASES
from torch import Tensor, fx, nn

from freewheel.compiler.cut.cut import cut_model
from freewheel.compiler.cut.declare import cut_once
from freewheel.compiler.cut.models import MODELS, row_of
from freewheel.compiler.cut.prove import random_weights
from freewheel.compiler.cut.row import SIZES, Row, prompt, step
from freewheel.compiler.cut.row import run as timestep
from freewheel.compiler.cut.trace import Trace, trace
from freewheel.compiler.cut.words import Cut

if not hasattr(
    transformer_cosmos, "transforms"
):  # of torchvision, whose `resize` of a tensor this is
    transformer_cosmos.transforms = SimpleNamespace(
        InterpolationMode=SimpleNamespace(NEAREST="nearest"),
        functional=SimpleNamespace(
            resize=lambda image, size, interpolation: nn.functional.interpolate(
                image, size, mode=interpolation
            )
        ),
    )

EVERY_RUN = ("wan", "flux", "qwen_image")
"""Cases of `make test`: one stream with cross-attention, two kinds of blocks, complex numbers."""


@dataclass(frozen=True)
class Case:
    """A transformer with random weights, and its cut, which takes seconds when first asked for."""

    row: Row
    model: nn.Module
    weights: Mapping[str, Tensor]
    make_cut: Callable[[], Cut]

    @cached_property
    def cut(self) -> Cut:
        return self.make_cut()


def row_and_config(name: str) -> tuple[Row, dict[str, Any]]:
    """Return the row of a case's class, and a small config."""
    if name in HELD_OUT:
        row, config = HELD_OUT[name]
        assert row_of(row.model) is None, "it has a row now: hold another class out"
        return row, config
    class_name, config = CASES[name]
    (row,) = (row for row in MODELS if row.model == class_name)
    return row, config


@cache
def case(name: str) -> Case:
    """Return a case, which is cut once."""
    row, config = row_and_config(name)
    model_class = getattr(diffusers, row.model)
    model = random_weights(model_class.from_config(config).eval())
    weights = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    whole = json.dumps(dict(model.config), sort_keys=True)
    return Case(row, model, weights, partial(cut_once, row, model_class, whole))


def smallest(one: Case) -> dict[str, int]:
    """Return the smallest sizes that the transformer itself runs at: one of each, or two frames.

    Allegro squeezes away the axis of its tokens where there is one; Wan Animate's first frame has no pose.
    """
    more = {"frames": 2} if one.row.name in ("allegro", "wan_animate") else {}
    return dict.fromkeys(SIZES, 1) | more


def traced(forward: Callable[..., Any], **inputs: Any) -> Trace:
    """Trace a function of tensors as if it were a transformer."""

    class Model(nn.Module):
        @classmethod
        def from_config(cls, config: Mapping[str, Any]) -> nn.Module:
            return cls()

        def forward(self, *, return_dict: bool, **given: Tensor) -> Any:
            return forward(**given)

    return trace(Row("Model", inputs), Model, {})


def run(found: Trace, **inputs: Tensor) -> Tensor:
    """Run a traced function's graph."""
    output = next(node for node in found.graph.nodes if node.op == "output")
    output.args = (found.results,)
    module = fx.GraphModule(nn.Module(), found.graph)
    values = {name: inputs.get(name) for name in found.inputs.values()}
    constants = {node.name: value for node, value in found.constants.items()}
    named = {node: values[name] for node, name in found.inputs.items()}
    given = [
        named[node] if node in named else constants[node.name]
        for node in found.graph.nodes
        if node.op == "placeholder"
    ]
    return module(*given)[0]


class Conditioned(nn.Module):
    """Scales of timestep and prompt together, which blocks and what is behind them read."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.value = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            scaled = nn.functional.layer_norm(x, [4]) * scale.unsqueeze(1)
            return x + nn.functional.scaled_dot_product_attention(
                self.query(scaled), self.key(scaled), self.value(scaled)
            )

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([self.Block() for _ in range(4)])
        self.embed, self.pool, self.scale = nn.Linear(1, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Conditioned:
        return cls()

    def forward(self, x: Tensor, t: Tensor, pooled: Tensor, *, return_dict: bool) -> Tensor:
        scale = self.scale((self.embed(t.unsqueeze(1)) + self.pool(pooled)).tanh())
        hidden = x.sin()
        for block in self.blocks:
            hidden = block(hidden, scale)
        return hidden * scale.unsqueeze(1)


CONDITIONED = Row(
    "Conditioned",
    {"x": step("batch tokens 4"), "t": timestep(), "pooled": prompt("batch 4")},
)


@cache
def conditioned() -> Case:
    """Return `Conditioned`, which is cut once."""
    model = random_weights(Conditioned())
    make_cut = partial(cut_model, CONDITIONED, Conditioned, {})
    return Case(CONDITIONED, model, dict(model.named_parameters()), make_cut)
