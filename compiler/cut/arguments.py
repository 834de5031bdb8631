# SPDX-License-Identifier: Apache-2.0
"""What a transformer's `forward` is given: a row's inputs in the nesting of its arguments, and values for them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ...bundle.streams import LATENTS
from .row import Ignored, Input, OfConfig, Row, Same

__all__ = ["by_path", "example", "filled", "leaves_of", "results_of", "tensors_of"]


def _is_leaf(value: object) -> bool:
    """Say whether an argument's nesting ends here."""
    return isinstance(value, Input) or value is None


def tensors_of(values: Any) -> list[Tensor]:
    """Return the tensors of a nested value, in order."""
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]


def filled(arguments: Mapping[str, Any], leaves: Iterable[Any]) -> dict[str, Any]:
    """Return `forward`'s arguments with a value in place of each `Input`, in order."""
    given = iter(leaves)
    found: dict[str, Any] = pytree.tree_map(
        lambda leaf: leaf.argument(next(given)) if isinstance(leaf, Input) else leaf,
        dict(arguments),
        is_leaf=_is_leaf,
    )
    for name, declared in arguments.items():
        if isinstance(declared, Input) and declared.over is not None:
            argument, dimension = declared.over
            times = found[argument].shape[dimension]
            found[name] = found[name].unsqueeze(-1).expand(-1, times)
    return {n: found[v.argument] if isinstance(v, Same) else v for n, v in found.items()}


def results_of(values: Any) -> list[Tensor]:
    """Return what a transformer returns; a list with each sample's result is one tensor."""
    returned = values if isinstance(values, tuple) else (values,)
    return [torch.stack(v) if isinstance(v, list) else v for v in returned if v is not None]


def leaves_of(row: Row, config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Input]]:
    """Return `forward`'s arguments for a config, and their inputs by name (``img_shapes.0.1``)."""
    arguments: dict[str, Any] = {
        name: value for name, value in row.inputs.items() if _is_taken(value, config)
    }
    fixed = {name: str(value) for name, (key, value) in row.fixed.items() if config.get(key)}

    def at_config(leaf: Any) -> Any:
        if isinstance(leaf, OfConfig):
            return leaf.number(config)
        return leaf.with_fixed(fixed) if isinstance(leaf, Input) else leaf

    arguments = pytree.tree_map(at_config, arguments, is_leaf=_is_leaf)
    named = {path: leaf for path, leaf in by_path(arguments) if isinstance(leaf, Input)}
    return {**arguments, "return_dict": False}, named


def by_path(arguments: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield what arguments are made of, by its place in them: ``img_shapes.0.1``."""
    leaves, _ = pytree.tree_flatten_with_path(dict(arguments), is_leaf=_is_leaf)
    for path, leaf in leaves:
        yield ".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path), leaf


def _is_taken(argument: Any, config: Mapping[str, Any]) -> bool:
    """Say whether a model of a config takes an argument: one that has no input, or one that it takes."""
    if isinstance(argument, Ignored):
        return False
    inputs = [i for i in pytree.tree_leaves(argument, is_leaf=_is_leaf) if isinstance(i, Input)]
    return not inputs or any(i.needs is None or config.get(i.needs) for i in inputs)


def example(
    declared: Input,
    config: Mapping[str, Any],
    sizes: Mapping[str, int],
    generator: torch.Generator,
) -> Any:
    """Return values for an input at given sizes: a tensor, or a whole number."""
    shape = declared.dimensions(config, sizes)
    dtype = getattr(torch, declared.dtype)
    if declared.changes == "shape":
        return shape[0]
    if declared.fill == "mask":  # each batch element has fewer ones than the one before it
        ones = torch.tensor([max(shape[-1] - 2 * i, 1) for i in range(shape[0])])
        return (torch.arange(shape[-1]) < ones[:, None]).reshape(shape).to(dtype)
    if declared.fill in ("timestep", "fraction"):
        values = torch.tensor([437.0 if one == LATENTS else 211.0 for one in declared.of])
        return (values if declared.fill == "timestep" else values / 1000).expand(shape).to(dtype)
    if declared.fill == "places":
        (before,) = replace(declared, shape=declared.behind).dimensions(config, sizes)
        return (before + torch.randperm(shape[0], generator=generator)).to(dtype)
    if declared.fill == "positions":
        return torch.randint(0, 9, shape, generator=generator).to(dtype)
    if isinstance(declared.fill, int):
        return torch.randint(0, declared.fill, shape, generator=generator).to(dtype)
    return torch.randn(shape, generator=generator).to(dtype)
