# SPDX-License-Identifier: Apache-2.0
"""A tensor whose values another process may still be computing.

A pipeline asks for one branch after the other and combines their outputs. Each process computes
its own branch when asked and hands out the other's as a promise, so that both compute at once;
the first operation that reads values fetches them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

__all__ = ["Awaited"]


class Awaited(Tensor):
    """A view of a buffer that is filled before the first operation on its values.

    Views of it are awaited too. Everything else gives plain tensors.
    """

    _buffer: Tensor
    _arrive: Callable[[], None]

    @staticmethod
    def __new__(cls, buffer: Tensor, arrive: Callable[[], None]) -> Awaited:
        """Wrap a buffer of known shape, dtype and device; ``arrive`` fills it, or has done so."""
        made: Awaited = Tensor._make_wrapper_subclass(
            cls,
            buffer.size(),
            strides=buffer.stride(),
            storage_offset=buffer.storage_offset(),
            dtype=buffer.dtype,
            device=buffer.device,
        )
        made._buffer, made._arrive = buffer, arrive
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # torch types it as a function
        """Show the values, which fetches them."""
        self._arrive()
        return repr(self._buffer)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # operators come below alone

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # the base's is an empty function
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator on buffers; only one that reads or writes values fetches them first."""
        seen: list[Awaited] = []

        def unwrap(tensor: Awaited) -> Tensor:
            seen.append(tensor)
            if not func.is_view:
                tensor._arrive()
            return tensor._buffer

        args, kwargs = tree_map_only(Awaited, unwrap, (args, kwargs or {}))
        made = func(*args, **kwargs)
        if not func.is_view:
            return made
        return tree_map_only(Tensor, lambda view: Awaited(view, seen[0]._arrive), made)
