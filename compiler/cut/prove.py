# SPDX-License-Identifier: Apache-2.0
"""Prove a cut: run its segments in PyTorch, chained, and compare with the transformer itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .models import Input, Row
from .trace import example, is_leaf, leaves_of, tensors_of
from .words import Call, Cut

__all__ = ["chain", "eager", "random_inputs", "random_weights", "relative_error"]

TABLE = 5
"""Timesteps in the batch with which a `run` segment is called, as a run calls it."""


def chain(cut: Cut, weights: Mapping[str, Tensor], inputs: Mapping[str, Any]) -> list[Tensor]:
    """Run a cut's calls one by one, as a runtime does.

    Args:
        cut: The cut.
        weights: Checkpoint name → tensor, float32.
        inputs: What `forward` is given, by name.

    Returns:
        What `forward` returns.
    """
    values: dict[str, Any] = {**weights, **inputs}
    for call in cut.calls:
        segment = cut.segments[call.segment]
        prefix = f"{call.block}." if call.block else ""
        own = {n: weights[prefix + n] for n, _ in segment.module.named_parameters()}
        arguments = [values[name] for name in call.inputs]
        with torch.no_grad():
            if segment.runs == "run":
                made = _rows(cut, call, own, arguments)
            else:
                made = torch.func.functional_call(segment.module, own, tuple(arguments))
        values.update(zip(call.outputs, made, strict=True))
    return [values[name] for name in cut.results]


def _rows(
    cut: Cut, call: Call, weights: Mapping[str, Tensor], arguments: list[Any]
) -> tuple[Tensor, ...]:
    """Call a `run` segment with several timesteps in one batch, and return the right row of each.

    The batch's elements all have one timestep.
    """
    module = cut.segments[call.segment].module
    batch, index = arguments[0].shape[0], TABLE // 2
    made: tuple[Tensor, ...]
    if any(argument.ndim != 1 or argument.unique().numel() != 1 for argument in arguments):
        made = torch.func.functional_call(module, dict(weights), tuple(arguments))
        return made
    table = [
        torch.stack([a[0] * (1 + (i - index) / 10) for i in range(TABLE)]).to(a.dtype)
        for a in arguments
    ]
    made = torch.func.functional_call(module, dict(weights), tuple(table))
    return tuple(rows[index : index + 1].expand(batch, *rows.shape[1:]) for rows in made)


def eager(row: Row, model: nn.Module, inputs: Mapping[str, Any]) -> list[Tensor]:
    """Run a transformer as it stands on the same inputs."""
    arguments, named = leaves_of(row, getattr(model, "config", {}))
    given = iter(inputs[name] for name in named)
    filled = pytree.tree_map(
        lambda leaf: next(given) if isinstance(leaf, Input) else leaf, arguments, is_leaf=is_leaf
    )
    with torch.no_grad():
        return tensors_of(model(**filled))


def random_inputs(
    row: Row, config: Mapping[str, Any], sizes: Mapping[str, int], *, seed: int = 0
) -> dict[str, Any]:
    """Return inputs of given sizes (`Row.sizes`), by name."""
    generator = torch.Generator().manual_seed(seed)
    _, named = leaves_of(row, config)
    return {n: example(declared, config, sizes, generator) for n, declared in named.items()}


def random_weights(model: nn.Module, *, seed: int = 0) -> nn.Module:
    """Fill a transformer with weights at which no part of it vanishes or saturates."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2:
                noise *= max(parameter[0].numel(), 1) ** -0.5
            else:
                noise = 0.1 * noise + float(name.endswith("weight"))
            parameter.copy_(noise)
    return model.requires_grad_(False)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the relative L2 distance, in float64."""
    difference = found.double() - expected.double()
    return float(difference.norm() / expected.double().norm())
