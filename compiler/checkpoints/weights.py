# SPDX-License-Identifier: Apache-2.0
"""Bring weights into a bundle: by hard link where they are right, else one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ...bundle.files import link_or_none
from ...bundle.manifest import TensorEntry
from ...bundle.safetensors_header import StoredTensor, encode_header
from ...core.dtypes import ITEM_BYTES
from ...core.errors import OutputError
from .sources import Weight, lies_as, read_weight

__all__ = ["bring_weights", "shards_to_link"]

CONVERTED_FILE_BYTES = 4 << 30


def bring_weights(
    wanted: Mapping[str, tuple[str, tuple[int, ...]]],
    stored: Mapping[str, Weight],
    bundle: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, TensorEntry]:
    """Make every wanted tensor readable below ``bundle/weights``.

    A tensor stored in the wanted dtype is referenced where it lies, through a hard link of its
    file. The rest (other dtype, made of other tensors, or a file system that can't link) is streamed
    into new files: in memory is one tensor at a time, with what it is made of.

    Args:
        wanted: Tensor name → (dtype, shape) that the graphs take.
        stored: The checkpoint's tensors, every wanted one among them (`check_tensors`).
        bundle: The bundle's folder; ``weights`` is made in it.
        progress: Called with bytes written and bytes to write.

    Returns:
        Tensor name → manifest entry.

    Raises:
        OutputError: the disk is full or not writable.
    """
    folder = bundle / "weights"
    folder.mkdir(exist_ok=True)
    lying = {n: w for n, w in stored.items() if isinstance(w, StoredTensor)}
    sources = sorted({w.file for n, w in lying.items() if n in wanted and w.dtype == wanted[n][0]})
    names = {source: f"weights/{source.name}" for source in sources}
    if len(set(names.values())) < len(names):  # shards of several experts have the same names
        names = {source: f"weights/{source.parent.name}-{source.name}" for source in sources}
    linked = {s for s in sources if link_or_none(s, bundle / names[s]) is not None}
    entries: dict[str, TensorEntry] = {}
    streamed = []
    for name, (dtype, shape) in wanted.items():
        place = lying.get(name)
        if place is not None and lies_as(place, dtype) and place.file in linked:
            entries[name] = TensorEntry(
                file=names[place.file],
                dtype=dtype,
                shape=list(shape),
                offset=place.offset,
                bytes=place.bytes,
            )
        else:
            streamed.append(name)
    total, done = sum(_size(*wanted[n]) for n in streamed), 0
    for index, batch in enumerate(_batches(streamed, wanted)):
        file = f"weights/converted-{index:05d}.safetensors"
        header, offsets = encode_header({n: wanted[n] for n in batch})
        try:
            with (bundle / file).open("wb") as out:
                out.write(header)
                for name in batch:
                    out.write(_converted_bytes(stored[name], wanted[name][0]))
                    done += _size(*wanted[name])
                    progress(done, total)
        except OSError as error:
            raise OutputError(
                str(bundle / file),
                f"can't be written: {error.strerror}",
                "free space or choose another --out",
            ) from error
        for name in batch:
            dtype, shape = wanted[name]
            entries[name] = TensorEntry(
                file=file,
                dtype=dtype,
                shape=list(shape),
                offset=offsets[name],
                bytes=_size(dtype, shape),
            )
    return entries


def shards_to_link(
    wanted: Mapping[str, tuple[str, tuple[int, ...]]], stored: Mapping[str, Weight], bundle: Path
) -> list[Path]:
    """List the checkpoint's files that `bring_weights` will share with a bundle, as headers tell."""
    lying = [(stored[name], dtype) for name, (dtype, _) in wanted.items() if name in stored]
    files = {w.file for w, d in lying if isinstance(w, StoredTensor) and lies_as(w, d)}
    return sorted(f for f in files if f.stat().st_dev == bundle.stat().st_dev)


def _size(dtype: str, shape: tuple[int, ...]) -> int:
    count = 1
    for s in shape:
        count *= s
    return count * ITEM_BYTES[dtype]


def _batches(
    names: Iterable[str], wanted: Mapping[str, tuple[str, tuple[int, ...]]]
) -> Iterable[list[str]]:
    batch: list[str] = []
    size = 0
    for name in names:
        batch.append(name)
        size += _size(*wanted[name])
        if size >= CONVERTED_FILE_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _converted_bytes(weight: Weight, dtype: str) -> memoryview:
    target: torch.dtype = getattr(torch, dtype)
    tensor = read_weight(weight).to(target).contiguous()
    content: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(content)
