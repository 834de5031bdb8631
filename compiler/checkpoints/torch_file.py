# SPDX-License-Identifier: Apache-2.0
"""Read the tensors of a file that `torch.save` wrote, as data: nothing of it is unpickled.

Such a file is a zip of raw storages and of a pickle that names them. The pickle's operations are
listed, and those few that a dictionary of tensors takes are followed here; any other refuses the file.
"""

from __future__ import annotations

import pickletools
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...core.errors import CheckpointError

__all__ = ["read_torch_file"]

STORAGES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "torch FloatStorage": torch.float32,
        "torch HalfStorage": torch.float16,
        "torch BFloat16Storage": torch.bfloat16,
        "torch DoubleStorage": torch.float64,
        "torch LongStorage": torch.int64,
        "torch IntStorage": torch.int32,
        "torch ByteStorage": torch.uint8,
        "torch CharStorage": torch.int8,
        "torch BoolStorage": torch.bool,
    }
)
TENSOR, DICT = "torch._utils _rebuild_tensor_v2", "collections OrderedDict"
LOCAL_HEADER_BYTES = 30


@dataclass(frozen=True)
class _Named:
    """A class or function that the pickle names."""

    name: str


@dataclass(frozen=True)
class _Storage:
    dtype: torch.dtype
    key: str
    items: int


@dataclass(frozen=True)
class _Placed:
    """A tensor: part of a storage."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_torch_file(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a file by name, mapped into memory.

    Raises:
        CheckpointError: it is no such file, is damaged, or holds more than named tensors.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            name = next(n for n in archive.namelist() if n.rpartition("/")[2] == "data.pkl")
            found = _follow(archive.read(name))
            if not isinstance(found, dict) or not all(
                isinstance(t, _Placed) for t in found.values()
            ):
                raise ValueError("holds more than named tensors")
            entries = {n: archive.getinfo(n) for n in archive.namelist()}
        prefix = name.removesuffix("data.pkl")
        return {
            str(n): _tensor(file, t, entries[f"{prefix}data/{t.storage.key}"])
            for n, t in found.items()
        }
    except (
        OSError,
        zipfile.BadZipFile,
        ValueError,
        LookupError,
        StopIteration,
        TypeError,
    ) as error:
        reason = str(error) or type(error).__name__
        raise CheckpointError(
            str(file), f"can't be read as tensors: {reason}", "fetch the file again"
        ) from error


def _follow(data: bytes) -> Any:
    """Return what a pickle describes, of dictionaries, numbers, texts and places of tensors alone."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        begin = marks.pop()
        taken = stack[begin:]
        del stack[begin:]
        return taken

    def pops(count: int) -> list[Any]:
        taken = stack[len(stack) - count :]
        del stack[len(stack) - count :]
        return taken

    def set_items(pairs: list[Any]) -> None:
        stack[-1].update(zip(pairs[::2], pairs[1::2], strict=True))

    constants = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
    values = {"BINUNICODE", "SHORT_BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"}
    actions: dict[str, Callable[[Any], Any]] = {
        "EMPTY_DICT": lambda _: stack.append({}),
        "MARK": lambda _: marks.append(len(stack)),
        "GLOBAL": lambda arg: stack.append(_Named(arg)),
        "TUPLE": lambda _: stack.append(tuple(since_mark())),
        "TUPLE1": lambda _: stack.append(tuple(pops(1))),
        "TUPLE2": lambda _: stack.append(tuple(pops(2))),
        "TUPLE3": lambda _: stack.append(tuple(pops(3))),
        "SETITEM": lambda _: set_items(pops(2)),
        "SETITEMS": lambda _: set_items(since_mark()),
        "BINPUT": lambda arg: memo.update({arg: stack[-1]}),
        "LONG_BINPUT": lambda arg: memo.update({arg: stack[-1]}),
        "BINGET": lambda arg: stack.append(memo[arg]),
        "LONG_BINGET": lambda arg: stack.append(memo[arg]),
        "BINPERSID": lambda _: stack.append(_storage(stack.pop())),
        "REDUCE": lambda _: stack.append(_made(*pops(2))),
        "BUILD": lambda _: stack.pop(),  # notes of a module's versions
    }
    for operation, argument, _ in pickletools.genops(data):
        if operation.name in constants:
            stack.append(constants[operation.name])
        elif operation.name in values:
            stack.append(argument)
        elif operation.name in actions:
            actions[operation.name](argument)
        elif operation.name not in ("PROTO", "STOP"):
            raise ValueError(f"holds more than named tensors (operation {operation.name})")
    return stack[-1]


def _storage(told: Any) -> _Storage:
    kind, storage, key, _, items = told
    if kind != "storage" or not isinstance(storage, _Named) or storage.name not in STORAGES:
        raise ValueError(f"holds a storage of unknown kind {told!r}")
    return _Storage(STORAGES[storage.name], str(key), int(items))


def _made(function: Any, arguments: tuple[Any, ...]) -> Any:
    name = function.name if isinstance(function, _Named) else repr(function)
    if name == DICT and not arguments:
        return {}
    if name == TENSOR:
        storage, offset, shape, strides = arguments[:4]
        return _Placed(storage, int(offset), tuple(shape), tuple(strides))
    raise ValueError(f"holds more than named tensors ('{name}')")


def _tensor(file: Path, place: _Placed, entry: zipfile.ZipInfo) -> Tensor:
    """Map a tensor's storage, having checked that it lies within its entry."""
    storage = place.storage
    size = storage.items * storage.dtype.itemsize
    last = place.offset + sum((n - 1) * s for n, s in zip(place.shape, place.strides, strict=True))
    is_empty = prod(place.shape) == 0
    if min((place.offset, *place.shape, *place.strides), default=0) < 0 or (
        not is_empty and last >= storage.items
    ):
        raise ValueError(f"a tensor of shape {list(place.shape)} leaves its storage")
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != size:
        raise ValueError(f"storage '{storage.key}' has not the {size} bytes that it should")
    if is_empty:
        return torch.empty(place.shape, dtype=storage.dtype)
    with file.open("rb") as stream:
        stream.seek(entry.header_offset)
        header = stream.read(LOCAL_HEADER_BYTES)
    lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    begin = entry.header_offset + LOCAL_HEADER_BYTES + lengths
    # Copy on write: torch wants memory that it may write to, and the file stays as it is.
    mapped = np.memmap(file, np.uint8, "c", begin, (size,))
    flat = torch.from_numpy(mapped).view(storage.dtype)
    return flat.as_strided(place.shape, place.strides, place.offset)
