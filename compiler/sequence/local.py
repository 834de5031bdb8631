# SPDX-License-Identifier: Apache-2.0
"""Which inputs of a graph are a rank's part, and that no token meets another inside of it.

A stream's tokens are shared out over ranks. Another input belongs to tokens (an angle of each, a mask)
or does not (keys of a prompt): the fewest are a rank's part with which the graph's sizes fit. What a
graph does with tokens is found by poisoning one of them: what is not a number spreads to all that is
computed of it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, fx

from ...core.errors import ExportError
from ...core.tensor_spec import TensorSpec
from .evaluate import Extents, measure, sizes_of_dims

__all__ = ["HINT", "LOCAL", "Tokens", "check_tokens_apart", "order_of_parts", "part_of_rank"]

LOCAL = "local_"
"""How the names of dimensions begin of which each rank has a part."""

HINT = "build without --sequence-parallel"

SMALL = 2
"""Tokens of the first stream that a graph is tried with; each further stream has one more."""

POISONED = 1
"""The token that is no number."""


@dataclass(frozen=True)
class Tokens:
    """The dimensions of tokens that ranks share out.

    Attributes:
        plain: Dimensions of streams' tokens.
        sums: Dimension of several streams' tokens in one sequence → those of the streams.
    """

    plain: Collection[str]
    sums: Mapping[str, list[str]]

    def axis(self, spec: TensorSpec) -> int | None:
        """Return a value's axis of tokens; None where it has none, or as many as rows, as masks."""
        found = [i for i, d in enumerate(spec.shape) if d in self.plain or d in self.sums]
        return found[0] if len(found) == 1 else None

    def local(self, spec: TensorSpec) -> TensorSpec:
        """Return what a rank has of a value."""
        axis = self.axis(spec)
        assert axis is not None, "a value of tokens"
        shape = list(spec.shape)
        shape[axis] = f"{LOCAL}{shape[axis]}"
        return replace(spec, shape=tuple(shape))

    @property
    def local_sums(self) -> dict[str, list[str]]:
        """Sums of what a rank has."""
        return {f"{LOCAL}{n}": [f"{LOCAL}{t}" for t in terms] for n, terms in self.sums.items()}


def part_of_rank(
    name: str,
    module: fx.GraphModule,
    inputs: Mapping[str, TensorSpec],
    streams: Collection[str],
    tokens: Tokens,
    fits: Callable[[Extents], bool],
) -> tuple[dict[str, TensorSpec], Extents]:
    """Find which inputs are a rank's part.

    Args:
        name: The graph's, for the message.
        module: The graph.
        inputs: Its arguments.
        streams: Those that are streams of tokens.
        tokens: What is shared out.
        fits: Says whether results are as they must be.

    Returns:
        The arguments as a rank has them, and what the graph made of them.

    Raises:
        ExportError: the graph's sizes fit with no choice.
    """
    others = [n for n, s in inputs.items() if n not in streams and tokens.axis(s) is not None]
    for count in range(len(others) + 1):
        for chosen in combinations(others, count):
            taken = {
                n: tokens.local(s) if n in streams or n in chosen else s for n, s in inputs.items()
            }
            dims = dict.fromkeys(d for s in taken.values() for d in s.shape if isinstance(d, str))
            sums = {**tokens.sums, **tokens.local_sums}
            sizes = sizes_of_dims([*dims, *tokens.local_sums], sums)
            try:
                found = measure(module, taken, sizes)
                if fits(found):
                    return taken, found
            except (RuntimeError, ValueError, AssertionError, LookupError):
                continue
    raise ExportError(
        f"graph '{name}'",
        "can't be computed with part of the tokens, whichever inputs are shared out",
        HINT,
    )


class Trial:
    """A graph with a few tokens of each stream, all weights one number."""

    def __init__(self, module: fx.GraphModule, inputs: Mapping[str, TensorSpec]) -> None:
        self._module, self._inputs = module, inputs
        self._weights = {
            n: torch.full((), 0.5, dtype=w.dtype).expand(w.shape)
            for n, w in module.named_parameters()
        }

    def run(self, sizes: Mapping[str, int], poison: Callable[[str, Tensor], None]) -> list[Tensor]:
        """Run; ``poison`` is handed every argument."""
        given = []
        for name, spec in self._inputs.items():
            shape = [sizes[d] if isinstance(d, str) else d for d in spec.shape]
            value = torch.full(shape, 0.5).to(getattr(torch, spec.dtype))
            if value.is_floating_point():
                poison(name, value)
            given.append(value)
        with torch.no_grad():
            found: Any = torch.func.functional_call(self._module, self._weights, tuple(given))
        return list(found)


def trial_sizes(specs: Collection[TensorSpec], tokens: Tokens) -> dict[str, int]:
    """Return small sizes of all dimensions, different ones of different streams."""
    sums = {**tokens.sums, **tokens.local_sums}
    dims = dict.fromkeys(d for s in specs for d in s.shape if isinstance(d, str))
    terms = [term for dim in dims for term in sums.get(dim, ())]
    plain = [d for d in dict.fromkeys([*dims, *terms]) if d not in sums]
    found = {d: SMALL + i for i, d in enumerate(plain)}
    return found | {d: sum(found[t] for t in sums[d]) for d in dims if d in sums}


def order_of_parts(
    name: str,
    module: fx.GraphModule,
    inputs: Mapping[str, TensorSpec],
    result: tuple[int, TensorSpec],
    tokens: Tokens,
) -> list[str]:
    """Return the streams' dimensions in the order in which a result has their tokens.

    Args:
        name: The graph's, for the message.
        module: The graph.
        inputs: Its arguments, as a rank has them.
        result: Position of a result, and its spec, with an axis that is a sum of a rank's parts.
        tokens: What is shared out.

    Raises:
        ExportError: a stream's tokens don't lie side by side.
    """
    position, spec = result
    axis = next(i for i, d in enumerate(spec.shape) if d in tokens.local_sums)
    terms = tokens.local_sums[str(spec.shape[axis])]
    sizes = trial_sizes([*inputs.values(), spec], tokens)
    trial, first = Trial(module, inputs), {}
    for term in terms:

        def spoil(argument: str, value: Tensor, term: str = term) -> None:
            if term in inputs[argument].shape:
                value.fill_(float("nan"))

        made = trial.run(sizes, spoil)[position].movedim(axis, 0).flatten(1)
        rows = made.isnan().any(dim=1).nonzero().flatten().tolist()
        if len(rows) != sizes[term] or rows[-1] - rows[0] + 1 != len(rows):
            raise ExportError(
                f"graph '{name}'",
                f"has '{term.removeprefix(LOCAL)}' at tokens {rows} of its sequence",
                HINT,
            )
        first[term] = rows[0]
    return [t.removeprefix(LOCAL) for t in sorted(terms, key=lambda term: first[term])]


def check_tokens_apart(
    name: str,
    module: fx.GraphModule,
    inputs: Mapping[str, TensorSpec],
    outputs: Mapping[str, TensorSpec],
    tokens: Tokens,
    order: Sequence[str],
) -> None:
    """Raise where a graph brings tokens together that are on several ranks.

    Args:
        name: The graph's, for the message.
        module: The graph.
        inputs: Its arguments, as a rank has them.
        outputs: Its results, as a rank has them.
        tokens: What is shared out.
        order: Of streams in a sequence of several.

    Raises:
        ExportError: a result at one token, or at none, sees another token.
    """
    sizes = trial_sizes([*inputs.values(), *outputs.values()], tokens)
    trial, local = Trial(module, inputs), [f"{LOCAL}{d}" for d in order]

    def place(spec: TensorSpec, dim: str) -> tuple[int, int] | None:
        """Return the axis of a value, and the index there, that is the token of a stream."""
        for axis, found in enumerate(spec.shape):
            if found == dim:
                return axis, POISONED
            if dim in tokens.local_sums.get(str(found), ()):
                return axis, POISONED + sum(sizes[d] for d in local[: local.index(dim)])
        return None

    for dim in (d for d in local if any(place(s, d) for s in inputs.values())):

        def spoil(argument: str, value: Tensor, dim: str = dim) -> None:
            found = place(inputs[argument], dim)
            if found is not None:
                value.select(*found).fill_(float("nan"))

        for (output, spec), made in zip(outputs.items(), trial.run(sizes, spoil), strict=True):
            found, seen = place(spec, dim), made.isnan()
            if found is not None:
                seen.select(*found).fill_(False)
            if bool(seen.any()):
                raise ExportError(
                    f"graph '{name}', result '{output}'",
                    f"is computed of other tokens of '{dim.removeprefix(LOCAL)}' outside attention",
                    HINT,
                )
