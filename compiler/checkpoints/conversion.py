# SPDX-License-Identifier: Apache-2.0
"""Learn from a converter of state dicts what each new tensor is, without reading one.

The converter runs over tensors on ``meta``. A result that is a contiguous part of a source lies in
that source's file; of any other the operations are kept, to be run over the real tensors when it is
read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from ...bundle.safetensors_header import StoredTensor
from .sources import MadeTensor, ScaledTensor, Weight, part_of, read_weight

__all__ = ["Converter", "convert"]

Converter = Callable[[dict[str, Tensor]], dict[str, Tensor]]
"""Takes a state dict, out of which it may pop, and returns another."""

REASON = "fused, split or reordered"


def convert(
    sources: Mapping[str, Weight], converter: Converter
) -> tuple[dict[str, Weight], list[str]]:
    """Run a converter of state dicts over the shapes of ``sources``.

    Args:
        sources: Weights by their old names.
        converter: May rename, slice, chunk, concatenate and compute, but write into no tensor.

    Returns:
        New name → weight, and the old names that the converter left aside.

    Raises:
        NotImplementedError: it writes into a tensor.
        Exception: whatever it raises over tensors that it does not expect.
    """
    given = {n: _on_meta(w) for n, w in sources.items()}
    recorder = _Recorder({id(t): sources[n] for n, t in given.items()}, list(given.values()))
    left = dict(given)
    with recorder:
        made = converter(left)
    used = {id(t) for t in recorder.operands()} | {id(t) for t in made.values()}
    aside = [n for n, t in given.items() if id(t) not in used]
    return {n: recorder.weight(t) for n, t in made.items()}, aside


def _on_meta(weight: Weight) -> Tensor:
    return torch.empty(weight.shape, dtype=getattr(torch, weight.dtype), device="meta")


class _Recorder(TorchDispatchMode):
    """Notes how each tensor came about, and keeps it alive so that its identity stays its own.

    Args:
        sources: Identity of a source's tensor → its weight.
        alive: Those tensors.
    """

    def __init__(self, sources: Mapping[int, Weight], alive: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no types there
        self._sources, self._alive = sources, alive
        self._made: dict[int, tuple[Any, tuple[Any, ...], dict[str, Any], int | None]] = {}
        self._owner: dict[int, tuple[Tensor, int]] = {
            t.untyped_storage()._cdata: (t, 0) for t in alive
        }

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run one operation on ``meta`` and note its results."""
        if func._schema.is_mutable:
            raise NotImplementedError(f"the converter writes into a tensor: {func}")
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        several = isinstance(result, (list, tuple))
        for index, tensor in enumerate(result if several else [result]):
            self._alive.append(tensor)
            self._made[id(tensor)] = (func, args, kwargs, index if several else None)
            copied = _copied(func, args)
            if copied is not None and copied.is_contiguous():
                owner, offset = self._owner.get(copied.untyped_storage()._cdata, (copied, 0))
                place = (owner, offset + int(copied.storage_offset()))
                self._owner[tensor.untyped_storage()._cdata] = place
        return result

    def operands(self) -> list[Tensor]:
        """Return every tensor that an operation took."""
        taken = [tree_leaves((args, kwargs)) for _, args, kwargs, _ in self._made.values()]
        return [t for leaves in taken for t in leaves if isinstance(t, Tensor)]

    def weight(self, tensor: Tensor) -> Weight:
        """Return what a tensor on ``meta`` stands for."""
        if id(tensor) in self._sources:
            return self._sources[id(tensor)]
        owner, offset = self._owner.get(tensor.untyped_storage()._cdata, (tensor, 0))
        source = self._sources.get(id(owner))
        same = tensor.is_contiguous() and tensor.dtype == owner.dtype
        if isinstance(source, (StoredTensor, ScaledTensor)) and same:
            shape, first = tuple(tensor.shape), offset + int(tensor.storage_offset())
            if isinstance(source, StoredTensor):
                return part_of(source, shape, first)
            if (part := source.part(shape, first)) is not None:
                return part
        reason = source.reason if isinstance(source, MadeTensor) and same else REASON
        dtype = str(tensor.dtype).removeprefix("torch.")
        return MadeTensor(dtype, tuple(tensor.shape), reason, lambda: self._read(tensor, {}))

    def _read(self, tensor: Tensor, done: dict[int, Any]) -> Tensor:
        """Run what made ``tensor`` over real tensors, each operation once; ``done`` has results."""
        if id(tensor) in self._sources:
            if id(tensor) not in done:
                done[id(tensor)] = read_weight(self._sources[id(tensor)])
            source: Tensor = done[id(tensor)]
            return source
        func, args, kwargs, index = self._made[id(tensor)]
        if id(args) not in done:  # an operation's results share its arguments
            real_args, real_kwargs = tree_map(
                lambda leaf: self._read(leaf, done) if isinstance(leaf, Tensor) else leaf,
                (args, kwargs),
            )
            done[id(args)] = func(*real_args, **real_kwargs)
        result = done[id(args)]
        chosen: Tensor = result if index is None else result[index]
        return chosen


def _copied(func: Any, args: tuple[Any, ...]) -> Tensor | None:
    """Return the tensor of which an operation makes a plain copy; None of any other operation."""
    if func is torch.ops.aten.cat.default and len(args[0]) == 1:
        only: Tensor = args[0][0]
        return only
    if func is torch.ops.aten.clone.default:
        cloned: Tensor = args[0]
        return cloned
    return None
