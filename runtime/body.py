# SPDX-License-Identifier: Apache-2.0
"""The block loop of one branch, bound once: a computed step is one call per block."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..bundle.manifest import IoEntry
from ..configs.errors import RequestError
from ..engines.base import BoundCall
from .dims import match_dims, shape_of
from .model import LoadedModel

__all__ = ["Body", "allocate"]


def allocate(
    entries: Mapping[str, IoEntry], dims: Mapping[str, int], device: torch.device
) -> dict[str, Tensor]:
    """Return zeroed buffers for declared tensors."""
    return {
        n: torch.zeros(shape_of(e, dims), dtype=getattr(torch, e.dtype), device=device)
        for n, e in entries.items()
    }


class Body:
    """Prompt context and bound block calls of one branch.

    Hidden states go from ``hidden`` (kept, for the residual) through two alternating buffers that
    all branches share; ``hidden_out`` is the one the last block writes.

    Attributes:
        hidden_out: [batch, tokens, channels], where the body's result appears.
        taps: Two buffers of the feature, written in turn; empty until `bind_taps`.
    """

    def __init__(
        self,
        model: LoadedModel,
        branch: str,
        shared: Mapping[str, Tensor],
        prompt: Mapping[str, Tensor],
        dims: Mapping[str, int],
    ) -> None:
        """Allocate the branch's context, compute it from ``prompt``, bind every block.

        Raises:
            RequestError: the prompt's batch is not the latents'.
        """
        self._model, self._manifest = model, model.manifest
        self._prompt = {n: t.clone() for n, t in prompt.items()}
        dims = {**dims, **self._prompt_dims(branch, dims)}
        self._dims = dims
        graphs, device = self._manifest.graphs, model.device
        context = allocate(graphs["prompt"].outputs, dims, device)
        self._prompt_calls = [model.bind("prompt", {**self._prompt, **context})]
        self._blocks: list[BoundCall] = []
        self._tapped: list[BoundCall] = []
        self.taps: list[Tensor] = []
        source, targets = "hidden", {"hidden": "hidden_even", "hidden_even": "hidden_odd", "hidden_odd": "hidden_even"}
        for stage in self._manifest.stages:
            for block in range(stage.first, stage.first + stage.count):
                values = {**shared, **context}
                if stage.context is not None:
                    values |= allocate(graphs[stage.context].outputs, dims, device)
                    self._prompt_calls.append(model.bind(stage.context, values, block))
                values |= {"hidden": shared[source], "hidden_out": shared[targets[source]]}
                if block == self._manifest.feature_block and stage.tapped is not None:
                    self._tap = (stage.tapped, block, values)
                self._blocks.append(model.bind(stage.block, values, block))
                source = targets[source]
        self.hidden_out = shared[source]
        self.set_prompt(prompt)

    def _prompt_dims(self, branch: str, dims: Mapping[str, int]) -> dict[str, int]:
        found: dict[str, int] = {}
        for name, tensor in self._prompt.items():
            for dim, size in match_dims(name, self._manifest.inputs[name], tensor.shape).items():
                if dims.get(dim, size) != size:
                    raise RequestError(
                        f"branch '{branch}', input '{name}'",
                        f"has {dim} {size}, the latents have {dims[dim]}",
                        "give one prompt per batch element",
                    )
                found[dim] = size
        return found

    def fits(self, prompt: Mapping[str, Tensor]) -> bool:
        """Tell whether another prompt has the shapes that this body was bound for."""
        return all(self._prompt[n].shape == t.shape for n, t in prompt.items())

    def set_prompt(self, prompt: Mapping[str, Tensor]) -> None:
        """Compute the context of every block for this prompt."""
        for name, tensor in prompt.items():
            self._prompt[name].copy_(tensor)
        for call in self._prompt_calls:
            call.run()

    def bind_taps(self) -> None:
        """Allocate the feature buffers and bind the tapped block to each of them."""
        if self.taps:
            return
        graph, block, values = self._tap
        feature = {"attention_output": self._manifest.graphs[graph].outputs["attention_output"]}
        for _ in range(2):
            tap = allocate(feature, self._dims, self._model.device)
            self._tapped.append(self._model.bind(graph, {**values, **tap}, block))
            self.taps.append(tap["attention_output"])

    def run(self, tap: int | None = None) -> None:
        """Run every block; ``tap`` names the buffer that gets the feature, if one is wanted."""
        for block, call in enumerate(self._blocks):
            if tap is not None and block == self._manifest.feature_block:
                self._tapped[tap].run()
            else:
                call.run()
