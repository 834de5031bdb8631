# SPDX-License-Identifier: Apache-2.0
"""Python's own functions that would fix a size, replaced in diffusers' modules while one is traced.

`int(size)`, `len(tensor)`, `max(height, width)` and `torch.linspace(steps=size)` all ask a symbolic
size for a number, and so the graph would serve that number alone. A `functools.lru_cache` can't
hash a symbolic size, and would keep tensors of the trace beyond it. `enumerate(blocks)` would number
the blocks that are traced, not all that the model has.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

__all__ = ["symbolic_python"]

HELPER_MODULES = ("attention", "attention_processor", "embeddings", "normalization")

linspace = torch.linspace


@contextlib.contextmanager
def symbolic_python() -> Iterator[None]:
    """Keep sizes symbolic in every transformer of diffusers, inside the ``with`` block."""
    with contextlib.ExitStack() as stack:
        for module in _diffusers_modules():
            for name, function in REPLACED.items():
                stack.enter_context(patch.object(module, name, function, create=True))
            for holder, name, function in _cached_functions(module):
                stack.enter_context(patch.object(holder, name, function))
        stack.enter_context(patch.object(torch, "linspace", symbolic_linspace))
        yield


class _Int(type):
    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, (builtins.int, torch.SymInt))


class symbolic_int(builtins.int, metaclass=_Int):  # noqa: N801 - stands where `int` stands
    """`int` that leaves a symbolic size alone."""

    def __new__(cls, value: Any = 0, *base: Any) -> Any:
        """Return the symbolic size itself, else what `int` gives."""
        if isinstance(value, torch.SymInt):
            return value
        if isinstance(value, torch.SymFloat):
            return torch.sym_int(value)
        return builtins.int(value, *base)


def symbolic_len(value: Any) -> Any:
    """Return a tensor's first dimension, else what `len` gives."""
    return value.shape[0] if isinstance(value, torch.Tensor) else builtins.len(value)


def _extreme(of_sizes: Callable[..., Any], of_others: Callable[..., Any]) -> Callable[..., Any]:
    """Return `max` or `min` that compares symbolic sizes in the graph, not at the traced sizes."""

    def extreme(*values: Any, **options: Any) -> Any:
        items = values[0] if len(values) == 1 and isinstance(values[0], (tuple, list)) else values
        if not options and any(isinstance(item, torch.SymInt) for item in items):
            return functools.reduce(of_sizes, items)
        return of_others(*values, **options)

    return extreme


def enumerate_blocks(values: Any, start: int = 0) -> Iterator[tuple[int, Any]]:
    """`enumerate` that numbers a block by its name: of a run of equal ones some are left out."""
    if not isinstance(values, nn.ModuleList):
        return builtins.enumerate(values, start)
    return ((start + builtins.int(name), block) for name, block in values._modules.items())


def symbolic_linspace(start: Any, end: Any, steps: Any, **options: Any) -> torch.Tensor:
    """`torch.linspace` with a symbolic number of steps."""
    if not isinstance(steps, torch.SymInt):
        return linspace(start, end, steps, **options)
    dtype = options.get("dtype") or torch.get_default_dtype()
    count: Any = steps
    index = torch.arange(count, dtype=dtype, device=options.get("device"))
    points: torch.Tensor = start + index * ((end - start) / torch.sym_max(count - 1, 1))
    return points


REPLACED: dict[str, Any] = {
    "enumerate": enumerate_blocks,
    "int": symbolic_int,
    "len": symbolic_len,
    "max": _extreme(torch.sym_max, builtins.max),
    "min": _extreme(torch.sym_min, builtins.min),
}


def _diffusers_modules() -> list[ModuleType]:
    """Return every module of diffusers' transformers, and of their parts, imported so far."""
    helpers = {f"diffusers.models.{name}" for name in HELPER_MODULES}
    return [
        module
        for name, module in list(sys.modules.items())
        if name in helpers or name.startswith("diffusers.models.transformers.")
    ]


def _cached_functions(module: ModuleType) -> list[tuple[Any, str, Callable[..., Any]]]:
    """Return holder, name and bare function of each cached function of a module and its classes."""
    cached = type(functools.lru_cache(lambda: None))
    classes = [c for c in vars(module).values() if inspect.isclass(c)]
    holders = [module, *(c for c in classes if c.__module__ == module.__name__)]
    return [
        (holder, name, value.__wrapped__)
        for holder in holders
        for name, value in list(vars(holder).items())
        if isinstance(value, cached)
    ]
