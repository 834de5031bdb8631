# SPDX-License-Identifier: Apache-2.0
"""One value of a block, computed without the block, and without what runs on computed steps alone."""

from __future__ import annotations

import torch
from cases import conditioned
from torch import nn

from freewheel.compiler.cut.alone import alone
from freewheel.compiler.cut.taps import modulated_input


def test_a_blocks_input_is_computed_of_what_is_known_before_it() -> None:
    one = conditioned()
    call = next(c for c in one.cut.calls if c.block == "blocks.0")
    segment = one.cut.segments[call.segment]
    (begun,) = one.cut.segments["head"].outputs
    hidden = segment.inputs[call.inputs.index(begun)]
    signal = modulated_input(segment.module, hidden)
    made, read = alone(one.cut, call, segment.module, signal, name="modulate")
    assert made._get_name() == "modulate"
    condition = one.cut.segments["condition"]
    assert set(read.values()).isdisjoint(condition.outputs)
    assert {n for n, _ in made.named_parameters()} == {"scale.weight", "scale.bias"}

    given = {"x": torch.randn(2, 5, 4), "t": torch.tensor([0.3, 0.3]), "pooled": torch.randn(2, 4)}
    model = one.model
    values = {
        begun: given["x"].sin(),
        one.cut.segments["timestep"].outputs[0]: model.embed(given["t"].unsqueeze(1)),
        one.cut.segments["prompt"].outputs[0]: model.pool(given["pooled"]),
    }
    weights = {n: one.weights[n] for n, _ in made.named_parameters()}
    with torch.no_grad():
        found = torch.func.functional_call(made, weights, tuple(values[v] for v in read.values()))[
            0
        ]
        scale = model.scale(sum(list(values.values())[1:]).tanh()).unsqueeze(1)
        expected = nn.functional.layer_norm(given["x"].sin(), [4]) * scale
    assert torch.allclose(found, expected, atol=1e-6)
