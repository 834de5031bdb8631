# SPDX-License-Identifier: Apache-2.0
"""How an engine's outputs are compared, with engines made of plain functions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from freewheel.bundle.manifest import GraphEntry, IoEntry
from freewheel.bundle.reader import Bundle
from freewheel.compiler.cut.declared import Segment
from freewheel.compiler.cut.document import cut_of
from freewheel.compiler.graphs.export import BATCH_DIMS
from freewheel.compiler.verify.engines import (
    TOLERANCES,
    EngineCheck,
    Reference,
    Subject,
    compare,
    interface_fault,
    relative_l1,
    sample_dims,
    sample_inputs,
)
from freewheel.engines.base import TensorSpec

GOOD = ("float32", ("a", "b", 4))
SPEC = {"dtype": "float32", "shape": ["batch", "tokens", 4]}


def one(output: str) -> float:
    return 1.0


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.zeros(4, device="meta"), requires_grad=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + 1e-3 * hidden * self.factor


def subject(function, *, outputs: str = "hidden_out", blocks: int = 1) -> Subject:
    """Compare ``function`` of hidden states with `Scale` applied once per block."""
    io = IoEntry(**SPEC)
    spec = TensorSpec("float32", ("batch", "tokens", 4))
    segment = Segment("scale", "block", Scale(), {"hidden": spec}, {"hidden_out": spec})
    weights = [{"factor": torch.full((4,), float(1 + b))} for b in range(blocks)]
    chain = range(blocks) if blocks > 1 else ()
    taps = {"hidden_out": f"hidden_out.{blocks - 1}"} if blocks > 1 else {}

    def bind(values: Mapping[str, Tensor]) -> SimpleNamespace:
        return SimpleNamespace(run=lambda: values[outputs].copy_(function(values["hidden"])))

    return Subject(
        "scale",
        "fake",
        None,
        GraphEntry(file="f", runs="block", inputs={"hidden": io}, outputs={outputs: io}),
        SimpleNamespace(inputs={"hidden": spec}, outputs={outputs: spec}),
        bind,
        Reference(segment, weights, chain),
        torch.device("cpu"),
        lambda: None,
        dict,
        taps,
    )


def cases() -> list[dict[str, Tensor]]:
    return [{"hidden": torch.randn(1 + b, 3, 4)} for b in range(2)]


def test_what_a_block_adds_is_compared_not_the_stream_it_passes_on() -> None:
    (right,) = compare(subject(lambda x: x + 1e-3 * x), cases())
    (wrong,) = compare(subject(lambda x: x + 1.1e-3 * x), cases())
    assert right.ok
    assert right.error < 1e-3
    assert wrong.error == pytest.approx(0.1, rel=0.05)
    assert not wrong.ok


class Sine(nn.Module):
    """Angles of 1e4, as Ideogram 4 makes of a timestep."""

    def forward(self, timesteps: Tensor) -> Tensor:
        return torch.sin(timesteps * 10.0)


def test_a_table_may_be_off_by_what_rounding_of_its_timesteps_moves_it() -> None:
    def check(by: float, runs: Any) -> EngineCheck:
        entries = {n: IoEntry(dtype="float32", shape=["steps"]) for n in ("timesteps", "y")}
        inputs, outputs = ({n: entries[n]} for n in entries)
        spec = TensorSpec("float32", ("steps",))

        def bind(values: Mapping[str, Tensor]) -> SimpleNamespace:
            angles = values["timesteps"] * (10.0 * by)
            return SimpleNamespace(run=lambda: values["y"].copy_(angles.sin()))

        segment = Segment("table", runs, Sine(), {"timesteps": spec}, {"y": spec})
        one = Subject(
            "table",
            "fake",
            None,
            GraphEntry(file="f", runs=runs, inputs=inputs, outputs=outputs),
            SimpleNamespace(inputs={"timesteps": spec}, outputs={"y": spec}),
            bind,
            Reference(segment, [{}]),
            torch.device("cpu"),
            lambda: None,
            dict,
        )
        (found,) = compare(one, [{"timesteps": torch.linspace(500.0, 1000.0, 64)}])
        return found

    assert check(1 + 2**-23, "run").ok
    assert not check(1 + 2**-23, "block").ok
    assert not check(1 + 2**-19, "run").ok


def test_a_group_is_compared_with_its_blocks_in_a_row() -> None:
    def both(x: Tensor) -> Tensor:
        x = x + 1e-3 * x
        return x + 1e-3 * x * 2.0

    (check,) = compare(subject(both, blocks=2), cases())
    assert check.ok
    assert check.tolerance == pytest.approx(2**0.5 * TOLERANCES["float32"])


def test_an_output_that_is_not_finite_fails_and_stays_plain_data() -> None:
    (check,) = compare(subject(lambda x: x * float("nan")), cases())
    assert not check.ok
    assert check.as_dict()["error"] is None


def test_relative_l1_is_mean_absolute_difference_over_mean_magnitude() -> None:
    a, b = {"y": torch.tensor([1.0, -3.0])}, {"y": torch.tensor([1.1, -3.0])}
    assert relative_l1(a, b, one)["y"].error == pytest.approx(0.1 / 4)
    zero = {"y": torch.zeros(2)}
    assert relative_l1(zero, zero, one)["y"]
    assert not relative_l1(zero, a, one)["y"]


def test_tolerances_grow_as_precisions_round() -> None:
    rounding = {n: torch.finfo(getattr(torch, n)).eps for n in TOLERANCES}
    assert sorted(TOLERANCES, key=TOLERANCES.__getitem__) == sorted(rounding, key=rounding.get)
    assert TOLERANCES["bfloat16"] / TOLERANCES["float16"] == pytest.approx(8, rel=0.1)


@pytest.mark.parametrize(
    ("inputs", "outputs", "said"),
    [
        ({"hidden": ("float32", (1, 2, 4))}, {"y": GOOD}, None),
        ({}, {"y": GOOD}, "input 'hidden' is in the manifest only"),
        ({"hidden": GOOD}, {"y": ("float32", ("a", "b", 5))}, "output 'y' is"),
        ({"hidden": ("float16", ("a", "b", 4))}, {"y": GOOD}, "input 'hidden' is"),
    ],
)
def test_interfaces_are_held_to_the_manifest(inputs, outputs, said) -> None:
    io = IoEntry(**SPEC)
    entry = GraphEntry(file="f", runs="block", inputs={"hidden": io}, outputs={"y": io})
    engine = SimpleNamespace(
        inputs={n: TensorSpec(*s) for n, s in inputs.items()},
        outputs={n: TensorSpec(*s) for n, s in outputs.items()},
    )
    found = interface_fault(entry, engine)
    assert found == said or (said is not None and found is not None and found.startswith(said))


def test_sample_sizes_are_not_those_that_graphs_are_traced_with(tiny_bundle: Bundle) -> None:
    cut = cut_of(tiny_bundle)
    traced = {**BATCH_DIMS, **cut.example_dims}
    first, second = sample_dims(cut, 0), sample_dims(cut, 1)
    assert all(first[n] != second[n] for n in ("batch", "frames", "height", "text_tokens", "slots"))
    assert all(d["tokens"] != traced["tokens"] for d in (first, second))
    assert first["tokens"] == first["frames"] * (first["height"] // 2) * (first["width"] // 2)
    unknown = replace(cut, dims={}, sums={}, usual={})
    wanted = {d for i in cut.inputs.values() for d in i.spec.shape if isinstance(d, str)}
    assert wanted <= sample_dims(unknown, 0).keys(), "a dimension that nothing else tells"


def test_sample_inputs_are_seeded_and_timesteps_lie_in_their_range(tiny_bundle: Bundle) -> None:
    manifest, dims = tiny_bundle.manifest, sample_dims(cut_of(tiny_bundle), 0)
    entry = manifest.graphs["timestep"]
    first, again = (sample_inputs(entry, manifest, dims, seed=3) for _ in range(2))
    assert torch.equal(first["timesteps"], again["timesteps"])
    assert 0 <= first["timesteps"].min() <= first["timesteps"].max() <= 1000
    assert first["timesteps"].max() > 10
