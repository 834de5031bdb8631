# SPDX-License-Identifier: Apache-2.0
"""Run a segment's graph on tensors without data, to learn which sizes its values have.

Graphs are run at two sets of sizes: an extent that is the same in both is a number, any other is the
dimension that has those two sizes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode

from ...core.tensor_spec import TensorSpec
from ..cut.words import operation

__all__ = ["ATTENTION", "PRIMES", "Extents", "Sizes", "measure", "sizes_of_dims"]

ATTENTION = "scaled_dot_product_attention"
ROTARY = "RotaryEmbedding"
PRIMES = (
    (7, 1009, 1013, 1019, 1021, 1031, 1033, 1039, 1049, 1051, 1061, 1063, 1069, 1087),
    (11, 2003, 2011, 2017, 2027, 2029, 2039, 2053, 2063, 2069, 2081, 2083, 2087, 2089),
)

Sizes = Mapping[str, tuple[int, int]]
"""Dimension → its sizes in the two runs."""


@dataclass(frozen=True)
class Extents:
    """What two runs of a graph told.

    Attributes:
        shapes: Node that is one tensor → its shapes in the two runs.
        dtypes: The same node → its dtype.
        numbers: Nodes that are whole numbers: sizes, and what is computed of them.
        sizes: Of the dimensions.
    """

    shapes: Mapping[fx.Node, tuple[tuple[int, ...], tuple[int, ...]]]
    dtypes: Mapping[fx.Node, torch.dtype]
    numbers: frozenset[fx.Node]
    sizes: Sizes

    def spec(self, node: fx.Node) -> TensorSpec:
        """Return a value's dtype and named dimensions; of two of equal sizes the first.

        Raises:
            LookupError: it has an extent that no dimension has.
        """
        by_sizes = {pair: dim for dim, pair in reversed(list(self.sizes.items()))}
        pairs = zip(*self.shapes[node], strict=True)
        shape = tuple(a if a == b else by_sizes[a, b] for a, b in pairs)
        return TensorSpec(str(self.dtypes[node]).removeprefix("torch."), shape)


def sizes_of_dims(dims: Collection[str], sums: Mapping[str, Collection[Any]]) -> Sizes:
    """Return two sizes for each dimension; a sum of dimensions has the sum of theirs."""
    terms = [term for dim in dims for term in sums.get(dim, ())]
    names = [name for name in dict.fromkeys(["batch", *dims, *terms]) if name not in sums]
    found = {name: (PRIMES[0][i], PRIMES[1][i]) for i, name in enumerate(names)}
    for dim in (dim for dim in dims if dim in sums):
        found[dim] = (sum(found[t][0] for t in sums[dim]), sum(found[t][1] for t in sums[dim]))
    return found


def measure(module: fx.GraphModule, inputs: Mapping[str, TensorSpec], sizes: Sizes) -> Extents:
    """Run a graph at both sets of sizes.

    Args:
        module: The graph.
        inputs: Its arguments, in order → dtype and dimensions to run with.
        sizes: Of all dimensions of the inputs.

    Raises:
        RuntimeError, ValueError, AssertionError: the graph can't be run at such sizes.
    """
    one, other = (_Watched(module, inputs, sizes, run).seen() for run in (0, 1))
    tensors = {n: v for n, v in one.items() if isinstance(v, Tensor)}
    return Extents(
        {n: (tuple(v.shape), tuple(other[n].shape)) for n, v in tensors.items()},
        {n: v.dtype for n, v in tensors.items()},
        frozenset(n for n, v in one.items() if isinstance(v, (int, float))),
        sizes,
    )


class _Watched(fx.Interpreter):
    """Runs a graph on tensors without data, and keeps what every node gives."""

    def __init__(
        self, module: fx.GraphModule, inputs: Mapping[str, TensorSpec], sizes: Sizes, run: int
    ) -> None:
        super().__init__(module)
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._seen: dict[fx.Node, Any] = {}
        with self._mode:
            self._given = [
                torch.empty(
                    [sizes[d][run] if isinstance(d, str) else d for d in spec.shape],
                    dtype=getattr(torch, spec.dtype),
                )
                for spec in inputs.values()
            ]

    def seen(self) -> dict[fx.Node, Any]:
        """Run, and return what every node gave."""
        with self._mode, torch.no_grad():
            self.run(*self._given)
        return self._seen

    def run_node(self, n: fx.Node) -> Any:
        """Run a node and keep what it gives; tokens must fit where they meet others."""
        args, _ = self.fetch_args_kwargs_from_env(n)
        name = operation(n) if n.op == "call_function" else ""
        if name == ATTENTION:
            query, key, value, *_ = args
            assert key.shape[-2] == value.shape[-2], "a key for each value"
            made: Any = torch.empty((*query.shape[:-1], value.shape[-1]), dtype=query.dtype)
        else:
            if name == ROTARY:
                tokens = {arg.shape[-2] for arg in args[:3]}
                assert len(tokens) == 1, "an angle for each token"
            made = super().run_node(n)
        if n.op != "output":
            self._seen[n] = made
        return made

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Return a weight or a constant without data, on one device with all else."""
        held = self.fetch_attr(target)
        return torch.empty(held.shape, dtype=held.dtype)
