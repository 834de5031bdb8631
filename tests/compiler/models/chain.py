# SPDX-License-Identifier: Apache-2.0
"""A cut run as a runtime runs it, with PyTorch in place of engines, and random models to cut."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from freewheel.bundle.manifest import StageEntry
from freewheel.compiler.cut.declared import Cut, Segment


def randomised(model: Any, seed: int = 0) -> Any:
    """Fill every parameter of a model with random numbers, biases and norms included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = torch.randn(parameter.shape, generator=generator)
            is_norm = "norm" in name and parameter.ndim == 1 and name.endswith("weight")
            scale = 0.2 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            parameter.copy_(spread * scale + (1.0 if is_norm else 0.0))
    return model.eval()


def relative(found: Tensor, expected: Tensor) -> float:
    """Return the relative L2 distance."""
    return (found - expected).norm().item() / expected.norm().item()


class Chain:
    """The segments of a cut in the order in which sessions call them.

    Attributes:
        values: Every value of the last run by name; a block's feature as ``feature.<block>``.
    """

    def __init__(self, cut: Cut, model: Any) -> None:
        self.cut = cut
        self.segments = {s.name: s for s in cut.segments}
        self.weights = model.state_dict()
        self.values: dict[str, Tensor] = {}

    def loaded(self, segment: Segment, block: int) -> nn.Module:
        prefix = segment.prefix.replace("{block}", str(block))
        weights = {
            name: self.weights[prefix + name].to(parameter.dtype)
            for name, parameter in segment.module.named_parameters()
        }
        segment.module.load_state_dict(weights, strict=True, assign=True)
        return segment.module

    def call(
        self, name: str, block: int = 0, given: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Run a segment on ``values``, and check its outputs against what it declares."""
        segment = self.segments[name]
        given = self.values if given is None else given
        with torch.no_grad():
            module = self.loaded(segment, block)
            found = module(**{n: given[n] for n in segment.inputs})
        outputs = found if isinstance(found, tuple) else (found,)
        for (output, spec), tensor in zip(segment.outputs.items(), outputs, strict=True):
            fixed = [d for d in spec.shape if isinstance(d, int)]
            shape = [s for s, d in zip(tensor.shape, spec.shape, strict=True) if isinstance(d, int)]
            assert shape == fixed, (name, output)
            assert str(tensor.dtype) == f"torch.{spec.dtype}", (name, output)
        return dict(zip(segment.outputs, outputs, strict=True))

    def run(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the model output at the one timestep of ``inputs``; ``values`` has all outputs."""
        self.values = dict(inputs)
        self.tables: dict[str, Tensor] = {}
        readers = [g for g in self.cut.segments if g.runs != "run_block"]  # that takes tables whole
        rows = {n: s for g in readers for n, s in g.inputs.items()}
        for stage in self.cut.stages:
            rows |= {n: rows[name] for name, read in stage.reads.items() for n in read}
        for segment in self.cut.segments:
            if segment.runs in ("prompt", "shape"):
                self.values |= self.call(segment.name)
            elif segment.runs == "run":
                tables = self.call(segment.name)
                self.tables |= tables
                given = {n: t.view(rows[n].shape) if n in rows else t for n, t in tables.items()}
                self.values |= given
        self.values |= self.call("head")
        first = next(s for s in self.cut.stages if "hidden_out" in self.segments[s.block].outputs)
        self.values |= self.modulation(first, first.first)
        self.values |= self.call("modulate")
        begun = {stream: self.values[stream] for stream in self.cut.cached}
        left: list[dict[str, Tensor]] = []
        for stage in self.cut.stages:
            for block in range(stage.first, stage.first + stage.count):
                for name, read in stage.reads.items():
                    self.values[name] = self.values[read[block - stage.first]]
                if stage.context is not None:
                    self.values |= self.call(stage.context, block)
                self.values |= self.modulation(stage, block)
                for name, skip in stage.skips.items():
                    self.values[name] = left[skip.blocks[block - stage.first]][skip.stream]
                found = self.call(stage.tapped or stage.block, block)
                if stage.tapped is not None:
                    self.values[f"feature.{block}"] = found.pop("attention_output")
                left.append({n.removesuffix("_out"): t for n, t in found.items()})
                self.values |= left[-1]
        self.values |= {f"{stream}_out": self.values[stream] for stream in begun}
        self.values |= begun
        self.values |= self.call("finish")
        return self.values["model_output"]

    def modulation(self, stage: StageEntry, block: int) -> dict[str, Tensor]:
        """Return the rows that a block makes of the one timestep, and each prompt where it reads that."""
        if stage.modulation is None:
            return {}
        own = {n: read[block - stage.first] for n, read in stage.reads.items()}
        names = {n: own.get(n, n) for n in self.segments[stage.modulation].inputs}
        prompt = {n: self.values[v] for n, v in names.items() if v not in self.tables}
        batch = len(next(iter(prompt.values()))) if prompt else 1
        given = {
            n: self.tables[v].repeat_interleave(batch, dim=0)
            for n, v in names.items()
            if v in self.tables
        }
        made = self.call(stage.modulation, block, {**prompt, **given})
        inputs = self.segments[stage.block].inputs
        fixed = {n: [d if isinstance(d, int) else batch for d in inputs[n].shape] for n in made}
        return {n: table.view(fixed[n]) for n, table in made.items()}


def taken_weights(cut: Cut) -> set[str]:
    """Return every checkpoint tensor that some graph takes."""
    return {
        (s.prefix + name).replace("{block}", str(block))
        for s in cut.segments
        for name, _ in s.module.named_parameters()
        for block in cut.blocks_of(s.name)
    }
