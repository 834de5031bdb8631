# SPDX-License-Identifier: Apache-2.0
"""Compare engines with the PyTorch modules of their segments, through Polygraphy's comparator.

The error of an output is its relative L1 distance ``mean|found − expected| / mean|expected|``.
Where a graph passes the residual stream on (``hidden`` in, ``hidden_out`` out) what it *adds* is
compared: a large stream would hide a wrong block.

Tolerances (`TOLERANCES`) go by the coarser of a graph's precision and an output's dtype:

- float32, 1e-5. Its rounding is 6e-8; sums in another order bring the difference of two correct
  implementations to 1e-7 … 9e-7 (ONNX Runtime and OpenVINO on the trained demo model). TF32, or
  bfloat16 inside a float32 graph, lies a hundred times above.
- float16, 4e-3. Its rounding is 4.9e-4; about ten tensors of a block are rounded one after another
  in the module but not in an engine that keeps sums in float32.
- bfloat16, 3e-2. Its rounding is eight times float16's; so is this.

A group of n blocks may be off by √n as much: the rounding of one block is independent of another's.
Angles of 1e4, which some models make of a timestep, are not known to 1e-5 in float32: a per-run table
may also be off by as much as it moves when its timesteps are off by `ROUNDINGS`.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite, sqrt
from types import MappingProxyType
from typing import Any

import torch
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata
from polygraphy.comparator import Comparator
from polygraphy.logger import G_LOGGER
from torch import Tensor
from torch.func import functional_call

from ...bundle.dims import least
from ...bundle.manifest import GraphEntry, IoEntry, Manifest
from ...engines.base import BoundCall, Engine, TensorSpec
from ..cut.declared import Cut, Segment
from ..sizes import derived, shape_at

__all__ = [
    "TOLERANCES",
    "EngineCheck",
    "Reference",
    "Subject",
    "compare",
    "interface_fault",
    "sample_dims",
    "sample_inputs",
]

TOLERANCES: Mapping[str, float] = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}

ROUNDINGS = 2.0
"""Roundings of float32 that an engine may make otherwise before it takes an angle's sine: backends
divide by multiplying, and make one factor of two."""

PATCHES = ((1, 2, 3), (2, 3, 2))
"""Patches along each latent dimension, per case: neither is what graphs are traced with."""

Tensors = Mapping[str, Tensor]
TensorFunction = Callable[[Tensors], Tensors]
Ranges = Mapping[str, tuple[int, int]]
Bind = Callable[[Tensors], BoundCall]


@dataclass(frozen=True)
class Reference:
    """The PyTorch side: a segment with the bundle's weights, or consecutive blocks with theirs.

    Attributes:
        segment: Whose module runs.
        weights: Parameter name → tensor: one mapping, or one per block of a group in order.
        blocks: Block index of each of them, for a group; its outputs are ``name.<block>``.
        own_inputs: Inputs that each block of a group has of its own, as ``name.<block>``.
    """

    segment: Segment
    weights: Sequence[Tensors]
    blocks: Sequence[int] = ()
    own_inputs: frozenset[str] = frozenset()

    def __call__(self, inputs: Tensors) -> Tensors:
        """Run on the CPU."""
        outputs: dict[str, Tensor] = {}
        values = dict(inputs)
        for index, weights in enumerate(self.weights):
            block = self.blocks[index] if self.blocks else None
            own = {n: f"{n}.{block}" if n in self.own_inputs else n for n in self.segment.inputs}
            taken = {n: values.get(key) for n, key in own.items()}
            with torch.no_grad():
                found = functional_call(self.segment.module, dict(weights), (), taken)
            results = found if isinstance(found, tuple) else (found,)
            named = dict(zip(self.segment.outputs, results, strict=True))
            outputs |= {n if block is None else f"{n}.{block}": t for n, t in named.items()}
            if block is not None:
                values |= {n.removesuffix("_out"): t for n, t in named.items()}
        return outputs


@dataclass(frozen=True)
class Subject:
    """What is compared.

    Attributes:
        graph: Graph name.
        form: Backend of the engine, or ``onnx`` for the portable graph in ONNX Runtime.
        block: Block whose weights it gets (the first, of a group), or None.
        entry: Declared interface.
        engine: What ``bind`` binds to.
        bind: Binds inputs and outputs by name to the engine, and the weights of ``block``.
        reference: What it must equal.
        device: Where its buffers live.
        synchronize: Waits for the device.
        derive: Adds the dimensions that inputs alone don't tell to those they do.
        taps: Output of the graph → output of the reference, where they differ in name.
    """

    graph: str
    form: str
    block: int | None
    entry: GraphEntry
    engine: Engine
    bind: Bind
    reference: Reference
    device: torch.device
    synchronize: Callable[[], None]
    derive: Callable[[Mapping[str, int]], Mapping[str, int]]
    taps: Mapping[str, str] = field(default_factory=dict)

    def tolerance(self, output: str) -> float:
        """Return the relative L1 distance allowed to an output."""
        dtype = self.entry.outputs[output].dtype
        own = TOLERANCES.get(dtype, 0.0)  # a mask is the same or it is not
        coarser = max(TOLERANCES[self.entry.precision], own)
        return coarser * sqrt(max(1, len(self.reference.blocks)))


@dataclass(frozen=True)
class EngineCheck:
    """One output of one engine against PyTorch.

    Attributes:
        graph: Graph name.
        form: Backend, or ``onnx`` for the portable graph in ONNX Runtime.
        block: Block whose weights were bound, or None.
        output: Output name.
        error: Relative L1 distance, the worst of the cases; None where either was not finite.
        tolerance: Distance allowed.
        fault: Why the engine was not run, empty where it was.
    """

    graph: str
    form: str
    block: int | None
    output: str
    error: float | None
    tolerance: float
    fault: str = ""

    @property
    def ok(self) -> bool:
        """Whether the distance lies within the tolerance."""
        return self.error is not None and self.error <= self.tolerance

    def as_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {**asdict(self), "ok": self.ok}


@dataclass(frozen=True)
class RelativeL1:
    """What Polygraphy keeps of one compared output; true where it matches."""

    error: float
    tolerance: float

    def __bool__(self) -> bool:
        return self.error <= self.tolerance


class FunctionRunner(BaseRunner):  # type: ignore[misc]  # Polygraphy has no type hints
    """A Polygraphy runner around any function of tensors."""

    def __init__(
        self, name: str, inputs: Mapping[str, TensorSpec], function: TensorFunction
    ) -> None:
        super().__init__(name=name)
        self._inputs, self._function = inputs, function

    def get_input_metadata_impl(self) -> TensorMetadata:
        """Describe the inputs; named dimensions are dynamic."""
        metadata = TensorMetadata()
        for name, spec in self._inputs.items():
            shape = [None if isinstance(d, str) else d for d in spec.shape]
            metadata.add(name, getattr(torch, spec.dtype), shape)
        return metadata

    def infer_impl(self, feed_dict: Mapping[str, Tensor]) -> OrderedDict[str, Tensor]:
        """Run the function, and take the residual stream out of what it passes on."""
        began = time.perf_counter()
        outputs = self._function(feed_dict)
        self.inference_time = time.perf_counter() - began
        return OrderedDict((n, _added(n, t, feed_dict)) for n, t in outputs.items())


def compare(subject: Subject, cases: Sequence[Tensors]) -> list[EngineCheck]:
    """Run both sides on every case and compare each output.

    Args:
        subject: What is compared.
        cases: Inputs by name, on the CPU.
    """
    fault = interface_fault(subject.entry, subject.engine)
    if fault is not None:
        output = next(iter(subject.entry.outputs))
        about = (subject.graph, subject.form, subject.block, output)
        return [EngineCheck(*about, None, subject.tolerance(output), fault)]
    inputs = {n: e.spec for n, e in subject.entry.inputs.items()}
    runners = [
        FunctionRunner("pytorch", inputs, _expected(subject)),
        FunctionRunner(subject.form, inputs, _found(subject)),
    ]
    with G_LOGGER.verbosity():
        results = Comparator.run(runners, data_loader=[OrderedDict(c) for c in cases])
        accuracy = Comparator.compare_accuracy(
            results, compare_func=lambda a, b: relative_l1(a, b, subject.tolerance)
        )
    # Polygraphy 0.49 gives one result, later ones a list with one per function.
    result = accuracy if hasattr(accuracy, "items") else accuracy[0]
    rounds = result[("pytorch", subject.form)]
    moved = _moved_by_rounding(subject, cases)
    checks = []
    for output in subject.entry.outputs:
        errors = [r[output].error for r in rounds]
        worst = max(errors) if all(isfinite(e) for e in errors) else None
        about = (subject.graph, subject.form, subject.block, output)
        checks.append(EngineCheck(*about, worst, subject.tolerance(output) + moved[output]))
    return checks


def _moved_by_rounding(subject: Subject, cases: Sequence[Tensors]) -> Mapping[str, float]:
    """Return how far each per-run table moves with its timesteps' rounding; 0 of what is no table."""
    if subject.entry.runs != "run":
        return dict.fromkeys(subject.entry.outputs, 0.0)
    by = 1.0 + ROUNDINGS * torch.finfo(torch.float32).eps
    expected = _expected(subject)
    distances = [
        relative_l1(expected(case), expected({n: t * by for n, t in case.items()}), lambda _: 0.0)
        for case in cases
    ]
    return {n: max(d[n].error for d in distances) for n in subject.entry.outputs}


def interface_fault(entry: GraphEntry, engine: Engine) -> str | None:
    """Say where an engine's interface is not what the manifest declares, or None."""
    for kind, declared, found in (
        ("input", {**entry.inputs, **dict.fromkeys(entry.weights)}, engine.inputs),
        ("output", entry.outputs, engine.outputs),
    ):
        odd = sorted(declared.keys() ^ found.keys())
        if odd:
            where = "the manifest" if odd[0] in declared else "the engine"
            return f"{kind} '{odd[0]}' is in {where} only"
        for name, io in declared.items():
            if io is not None and not _fits(io, found[name]):
                spec = found[name]
                return (
                    f"{kind} '{name}' is {spec.dtype} {list(spec.shape)}, "
                    f"the manifest says {io.dtype} {io.shape}"
                )
    return None


def _fits(io: IoEntry, spec: TensorSpec) -> bool:
    """Tell whether dtype, rank and fixed sizes agree; engines may name dimensions otherwise."""
    same = len(io.shape) == len(spec.shape) and io.dtype == spec.dtype
    pairs = zip(io.shape, spec.shape, strict=False)
    return same and all(a == b for a, b in pairs if isinstance(a, int) and isinstance(b, int))


def relative_l1(
    expected: Mapping[str, Any], found: Mapping[str, Any], tolerance: Callable[[str], float]
) -> OrderedDict[str, RelativeL1]:
    """Compare two iterations for Polygraphy: ``mean|found − expected| / mean|expected|``."""
    compared = OrderedDict()
    for name in expected:
        reference, other = torch.as_tensor(expected[name]), torch.as_tensor(found[name])
        assert reference.shape == other.shape, "both were allocated for the declared shape"
        scale = float(reference.abs().mean())
        distance = float((other - reference).abs().mean())
        error = distance / scale if scale else (0.0 if distance == 0 else float("inf"))
        # NOTE: max() and JSON don't know NaN.
        compared[name] = RelativeL1(error if isfinite(error) else float("inf"), tolerance(name))
    return compared


def sample_dims(cut: Cut, case: int, ranges: Ranges = MappingProxyType({})) -> dict[str, int]:
    """Return small sizes for one of the `PATCHES` cases; batch and text differ between them too.

    Args:
        cut: The model, cut.
        case: Index into `PATCHES`.
        ranges: Smallest and largest size of dimensions, where an engine does not take any.
    """
    divisors = {dim: d for factors in cut.dims.values() for dim, d in factors}
    patches = dict(zip(("frames", "height", "width"), PATCHES[case], strict=True))
    dims = {dim: max(n * divisors.get(dim, 1), least(cut.sums, dim)) for dim, n in patches.items()}
    dims |= {"batch": 1 + case, "text_tokens": 7 + case}
    named = {d for i in cut.inputs.values() for d in i.spec.shape if isinstance(d, str)}
    others = sorted(named - dims.keys() - cut.dims.keys() - cut.sums.keys())
    dims |= {name: 9 + place + case for place, name in enumerate(others)}
    dims = _inside({**dims, "steps": 4 + case, "slots": 1 + case}, ranges)
    # A graph that takes tokens has a range for them, and none for what they derive from.
    return _inside(derived(cut, dims), ranges)


def _inside(dims: Mapping[str, int], ranges: Ranges) -> dict[str, int]:
    limits = {n: ranges.get(n, (size, size)) for n, size in dims.items()}
    return {n: min(max(size, limits[n][0]), limits[n][1]) for n, size in dims.items()}


def sample_inputs(
    entry: GraphEntry, manifest: Manifest, dims: Mapping[str, int], seed: int
) -> dict[str, Tensor]:
    """Return seeded random inputs: timesteps in [0, 1000], indices 0, the rest normal."""
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for name, io in entry.inputs.items():
        shape = shape_at(io.spec, dims)
        declared = manifest.inputs.get(name)
        if declared is not None and declared.runs == "run":
            value = 1000 * torch.rand(shape, generator=generator)
        elif io.dtype == "int64":  # a table may have one row
            value = torch.zeros(shape)
        else:
            value = torch.randn(shape, generator=generator)
        values[name] = value.to(getattr(torch, io.dtype))
    return values


def _expected(subject: Subject) -> TensorFunction:
    def run(inputs: Tensors) -> Tensors:
        outputs = subject.reference(inputs)
        return {n: outputs[subject.taps.get(n, n)].float() for n in subject.entry.outputs}

    return run


def _found(subject: Subject) -> TensorFunction:
    def run(inputs: Tensors) -> Tensors:
        placed = {n: t.to(subject.device).contiguous() for n, t in inputs.items()}
        dims = _sizes(subject, inputs)
        outputs = {
            n: torch.zeros(
                [dims[d] if isinstance(d, str) else d for d in e.shape],
                dtype=getattr(torch, e.dtype),
                device=subject.device,
            )
            for n, e in subject.entry.outputs.items()
        }
        subject.bind({**placed, **outputs}).run()
        subject.synchronize()
        return {n: t.cpu().float() for n, t in outputs.items()}

    return run


def _sizes(subject: Subject, inputs: Tensors) -> Mapping[str, int]:
    """Return the named dimensions of these inputs, and those that follow from them."""
    dims = {
        dim: size
        for name, io in subject.entry.inputs.items()
        for dim, size in zip(io.shape, inputs[name].shape, strict=True)
        if isinstance(dim, str)
    }
    return subject.derive(dims)


def _added(name: str, output: Tensor, inputs: Tensors) -> Tensor:
    stream = name.removesuffix("_out")
    return output - inputs[stream].float() if name != stream and stream in inputs else output
