# SPDX-License-Identifier: Apache-2.0
"""Give a segment's graph its dtypes: low precision for products of tokens, float32 for all else.

The rule is one for all models. Attention and weights' products with tokens take and give the body's
precision; norms, rotary embeddings, products of conditioning vectors and of two computed values (linear
attention sums over tokens, and divides by such a sum) are float32; everything else follows PyTorch's
own promotion, by which a stream stays float32 (float32 + low is float32) and what lies between two
products stays low. A weight is taken in the dtype it is stored in and cast in the graph, except by
products of the body, whose weights a build converts once. A weight in float8 is multiplied by the
scale of its rows in the graph, in float32, and cast where a product is low.

What depends on nothing is computed here and becomes a constant of the graph: another library's `exp`
would turn the angles of large numbers (timesteps, guidance · 1,000) by 1e-4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from types import MappingProxyType
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn

from ...bundle.scales import KEPT, scale_name
from .declared import StoredDtype
from .extract import hold
from .trace import hint, value_of
from .words import PRODUCTS, operation, sizes_of

__all__ = ["typed"]

EXACT = frozenset(
    {
        "RotaryEmbedding",
        "group_norm",
        "layer_norm",
        "mean",
        "native_layer_norm",
        "rms_norm",
        "softmax",
        "var",
        "var_mean",
    }
)
"""Operations in float32, as the published models compute them."""

ALIKE = frozenset({"index_put", "scatter", "scatter_add"})
"""Operations that promote nothing: they want one dtype."""


def typed(
    module: fx.GraphModule,
    given: Mapping[str, torch.dtype],
    *,
    precision: torch.dtype | None,
    stored: StoredDtype,
    batch: set[sympy.Symbol],
    names: Mapping[str, str] = MappingProxyType({}),
    returned: Mapping[int, torch.dtype] = MappingProxyType({}),
    scale: float = 1.0,
    offset: float = 0.0,
) -> tuple[fx.GraphModule, list[torch.dtype]]:
    """Copy a segment's graph with its dtypes.

    Args:
        module: The graph, all of it float32.
        given: Argument → dtype that it comes in.
        precision: Of products that touch tokens, whose weights are converted to it; None outside
            the body, where every weight is as stored.
        stored: dtype of each of the graph's own weights, by its name in the graph.
        batch: Sizes that a vector without tokens may have.
        names: Argument → what the copy calls it.
        returned: Position of a result → dtype that it is cast to.
        scale: What arguments are divided by,
        offset: after this is taken off them.

    Returns:
        The graph, and the dtypes of what it returns. A whole number that the graph takes becomes
        the length of a vector, as bundles hand it in.
    """
    typing = _Typing(module, given, precision, stored, batch)
    return typing.run(names, returned, scale=scale, offset=offset)


class _Typing:
    """Copies a graph node by node; runs each on tensors without data to learn its dtype."""

    def __init__(
        self,
        module: fx.GraphModule,
        given: Mapping[str, torch.dtype],
        precision: torch.dtype | None,
        stored: StoredDtype,
        batch: set[sympy.Symbol],
    ) -> None:
        self.module, self.given, self.precision = module, given, precision
        self.stored, self.batch = stored, batch
        self.root, self.graph = nn.Module(), fx.Graph()
        self.copies: dict[fx.Node, fx.Node] = {}
        self.values: dict[fx.Node, Any] = {}
        self.casts: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}
        self.weights: dict[fx.Node, Tensor] = {}
        self.constants: dict[fx.Node, Any] = {}

    def run(
        self,
        names: Mapping[str, str],
        cast: Mapping[int, torch.dtype],
        *,
        scale: float,
        offset: float,
    ) -> tuple[fx.GraphModule, list[torch.dtype]]:
        """Copy the graph."""
        returned: list[fx.Node] = []
        for node in self.module.graph.nodes:
            if node.op == "output":
                results = [self.copies[one] for one in node.args[0]]
                returned = [self._returned(one, cast.get(i)) for i, one in enumerate(results)]
            elif node.op == "placeholder":
                copy = self._argument(node, names.get(node.name, node.name))
                self.copies[node] = self._brought_back(copy, scale, offset)
            else:
                self.copies[node] = self._copy(node)
        dtypes = [self.values[one].dtype for one in returned]
        self.graph.output(tuple(returned))
        self.graph.eliminate_dead_code()
        for node in self.graph.find_nodes(op="get_attr"):
            hold(self.root, str(node.target), self.weights[node])
        made = fx.GraphModule(self.root, self.graph, class_name=self.module._get_name())
        # What no checkpoint holds is no part of a state dict; a graph module forgets that.
        made._non_persistent_buffers_set.update(name for name, _ in made.named_buffers())
        return made, dtypes

    def _returned(self, node: fx.Node, dtype: torch.dtype | None) -> fx.Node:
        """Cast a result; no engine hands on float64, in which some models make rotary tables."""
        is_double = self.values[node].dtype == torch.float64
        wanted = torch.float32 if dtype is None and is_double else dtype
        return node if wanted is None else self._cast(node, wanted)

    def _argument(self, node: fx.Node, name: str) -> fx.Node:
        """Copy an argument; a whole number is the length of a vector."""
        copy = self.graph.placeholder(name)
        value = value_of(node)
        if isinstance(value, Tensor):
            self.values[copy] = _on_meta(value, self.given.get(node.name))
        else:
            self.values[copy] = torch.empty(hint(value), device="meta")
            copy = self.graph.call_function(torch.ops.aten.sym_size.int, (copy, 0))
            self.values[copy] = hint(value)
        copy.meta = {**node.meta}
        return copy

    def _brought_back(self, node: fx.Node, scale: float, offset: float) -> fx.Node:
        """Return (value − offset) / scale."""
        steps = [(torch.ops.aten.sub.Tensor, offset)] * (offset != 0.0)
        steps += [(torch.ops.aten.div.Tensor, scale)] * (scale != 1.0)
        for function, number in steps:
            node = self.graph.call_function(function, (node, number))
            self._infer(node)
        return node

    def _copy(self, node: fx.Node) -> fx.Node:
        if self.precision is not None and _widens(node):  # to turn pairs: float32 does
            return self.copies[node.all_input_nodes[0]]
        copy = self._weight(node) if node.op == "get_attr" else self._operation(node)
        copy.meta = {**node.meta, **copy.meta}
        return copy

    def _weight(self, node: fx.Node) -> fx.Node:
        """Copy a weight; outside the body's products it is cast to float32."""
        path = str(node.target)
        value = _attribute(self.module, path)
        copy = self.graph.get_attr(path)
        if not isinstance(value, nn.Parameter):
            self.constants[copy] = self.weights[copy] = self.values[copy] = value
            return copy
        stored = self.stored(path)
        if stored == KEPT:
            return self._scaled(copy, path, value)
        taken = self.precision
        if not node.users or not all(map(self._is_low, node.users)):
            taken = None
        self._hold(copy, value.shape, taken or getattr(torch, stored))
        return self._cast(copy, torch.float32) if taken is None else copy

    def _scaled(self, copy: fx.Node, path: str, value: Tensor) -> fx.Node:
        """Return a weight that comes in float8, multiplied by the scale of its rows, in float32."""
        scale = self.graph.get_attr(scale_name(path))
        self._hold(copy, value.shape, getattr(torch, KEPT))
        self._hold(scale, (*value.shape[:1], *[1] * (value.ndim - 1)), torch.float32)
        wide = self._cast(copy, torch.float32)
        product = self.graph.call_function(torch.ops.aten.mul.Tensor, (wide, scale))
        self._infer(product)
        return product

    def _hold(self, node: fx.Node, shape: Sequence[int], dtype: torch.dtype) -> None:
        """Say what a node that reads a weight gets."""
        self.values[node] = torch.empty(shape, dtype=dtype, device="meta")
        self.weights[node] = nn.Parameter(self.values[node], requires_grad=False)

    def _is_low(self, node: fx.Node) -> bool:
        """Say whether a node is attention, or a weight's product with tokens, of the body."""
        if self.precision is None or operation(node) not in PRODUCTS:
            return False
        read = node.all_input_nodes
        computed = [n for n in read if getattr(n.meta.get("dependency"), "on", None)]
        if len(computed) > 1 and operation(node) != "scaled_dot_product_attention":
            return False
        return any(sizes_of(n) - self.batch for n in (node, *read)) or any(
            _has_fixed_tokens(n) for n in (node, *computed)
        )

    def _operation(self, node: fx.Node) -> fx.Node:
        wanted: torch.dtype | None = None
        if operation(node) in PRODUCTS:
            wanted = (self._is_low(node) and self.precision) or torch.float32
        elif operation(node) in EXACT:
            wanted = torch.float32
        elif operation(node) in ALIKE:
            wanted = self._promoted(node)

        read = [self.copies[one] for one in node.all_input_nodes]
        if all(one in self.constants for one in read):
            return self._constant(node)
        placed = next(
            (n for n in read if getattr(self.values[n], "device", None) == torch.device("meta")),
            None,
        )

        def argument(one: fx.Node) -> Any:
            number = self.constants.get(self.copies[one])
            if isinstance(number, (int, float)):
                return number
            copy = self._beside(self.copies[one], placed)
            return copy if wanted is None else self._cast(copy, wanted)

        target: Any = node.target
        kwargs = dict(fx.map_arg(node.kwargs, argument))
        if placed is not None:
            kwargs.pop("device", None)  # a graph lies on one device, whichever that is
        copy = self.graph.call_function(target, fx.map_arg(node.args, argument), kwargs)
        self._infer(copy)
        return copy

    def _promoted(self, node: fx.Node) -> torch.dtype | None:
        """Return the widest dtype of the real numbers that a node takes."""
        given = [self.values[self.copies[one]] for one in node.all_input_nodes]
        dtypes = [g.dtype for g in given if isinstance(g, Tensor) and g.is_floating_point()]
        return reduce(torch.promote_types, dtypes) if dtypes else None

    def _constant(self, node: fx.Node) -> fx.Node:
        """Compute what depends on nothing."""
        copies, target = self.copies, node.target

        def known(one: fx.Node) -> Any:
            return self.constants[copies[one]]

        with torch.no_grad():
            value: Any = target(*fx.map_arg(node.args, known), **fx.map_arg(node.kwargs, known))  # type: ignore[operator]  # a function
        if not isinstance(value, Tensor):  # a number, or a tuple of which elements are taken
            copy = self.graph.call_function(tuple, ())
        else:
            copy = self.graph.get_attr(f"constant_{node.name}")
            self.weights[copy] = value.contiguous()
        self.constants[copy] = self.values[copy] = value
        return copy

    def _beside(self, node: fx.Node, other: fx.Node | None) -> fx.Node:
        """Return a constant, or what is made of constants and sizes, on another value's device."""
        value = self.values[node]
        if other is None or not isinstance(value, Tensor) or value.device.type == "meta":
            return node
        moved = self.graph.call_function(on_device_of, (node, other))
        self.values[moved] = value.to("meta")
        return moved

    def _cast(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        """Return a value in a dtype; the value itself if it has it, or holds no real numbers."""
        value = self.values[node]
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == dtype:
            return node
        if (node, dtype) not in self.casts:
            cast = self.graph.call_function(torch.ops.aten.to.dtype, (node, dtype))
            cast.meta = {key: kept for key, kept in node.meta.items() if key != "val"}
            self._infer(cast)
            self.casts[node, dtype] = cast
        return self.casts[node, dtype]

    def _infer(self, node: fx.Node) -> None:
        target: Any = node.target
        args = fx.map_arg(node.args, self.values.__getitem__)
        kwargs = fx.map_arg(node.kwargs, self.values.__getitem__)
        with torch.no_grad():
            self.values[node] = target(*args, **kwargs)


def _has_fixed_tokens(node: fx.Node) -> bool:
    """Say whether a value has several tokens in every run: sound or a text of one length."""
    value = value_of(node)
    between = value.shape[1:-1] if isinstance(value, Tensor) else ()
    return any(isinstance(extent, int) and extent > 1 for extent in between)


def _widens(node: fx.Node) -> bool:
    """Say whether a node casts to float64."""
    return operation(node) in ("_to_copy", "to") and value_of(node).dtype == torch.float64


def on_device_of(constant: Tensor, other: Tensor) -> Tensor:
    """Return a constant on the device of what it meets: weights lie on ``meta`` when a graph is exported."""
    return constant.to(other.device)


def _on_meta(value: Any, dtype: torch.dtype | None) -> Any:
    """Return a traced value at the sizes it was traced with, without data."""
    if not isinstance(value, Tensor):
        return hint(value)
    return torch.empty(
        [hint(extent) for extent in value.shape], dtype=dtype or value.dtype, device="meta"
    )


def _attribute(module: nn.Module, path: str) -> Any:
    parent, _, name = path.rpartition(".")
    return getattr(module.get_submodule(parent), name)
