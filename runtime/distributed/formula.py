# SPDX-License-Identifier: Apache-2.0
"""Bytes that a rank sends per step when ranks share a sequence, of sizes alone."""

from __future__ import annotations

from collections.abc import Mapping

from ...bundle.manifest import IoEntry, Manifest, SequenceEntry
from ...core.dtypes import ITEM_BYTES
from .shares import LOCAL, Share

__all__ = ["FORMULA", "sent_bytes"]

FORMULA = (
    "attentions · batch · size · bytes · (3 · own tokens · others' heads + own heads · others' tokens) "
    "+ masks + own rows · others"
)


def sent_bytes(manifest: Manifest, own: Share, dims: Mapping[str, int]) -> tuple[int, int]:
    """Return the bytes that a rank sends in a computed step, and in a reused one.

    Features, and sums that policies look at, come on top.

    Args:
        manifest: Of the whole model.
        own: The rank's part.
        dims: All sizes.
    """
    assert manifest.sequence is not None, "asked of a bundle that ranks can share"
    entry, others = manifest.sequence, own.size - 1
    rows = manifest.graphs[entry.rows].outputs
    ((_, io),) = rows.items()
    gathered = others * _bytes(io, dims)
    attention = sum(
        stage.count * _of_block(manifest, entry, stage.block, own, dims)
        for stage in manifest.stages
        if stage.block in entry.blocks
    )
    return (attention + gathered if own.size > 1 else 0), (gathered if own.size > 1 else 0)


def _of_block(
    manifest: Manifest, entry: SequenceEntry, block: str, own: Share, dims: Mapping[str, int]
) -> int:
    parts = entry.blocks[block]
    outputs = {n: io for p in parts for n, io in manifest.graphs[p.graph].outputs.items()}
    inputs = {n: io for p in parts for n, io in manifest.graphs[p.graph].inputs.items()}
    total = 0
    for place, part in enumerate(parts):
        if manifest.graphs[part.graph].runs != "attention":
            continue
        query, key, value = (outputs[f"{n}_{place // 2 + 1}"] for n in ("query", "key", "value"))
        for operand in (query, key, value):
            heads = int(operand.shape[0])
            first, end = own.places(heads)[own.rank]
            total += _bytes(operand, dims) // heads * (heads - (end - first))
        heads, tokens = int(query.shape[0]), str(query.shape[2])
        first, end = own.places(heads)[own.rank]
        counts = own.counts(tokens.removeprefix(LOCAL), dims)
        each = _bytes(query, dims) // heads // dims[tokens]
        total += each * (end - first) * (sum(counts) - counts[own.rank])
        mask = None if part.mask is None else {**inputs, **outputs}.get(part.mask)
        if mask is not None and str(mask.shape[-1]).startswith(LOCAL):
            total += _bytes(mask, dims) * (own.size - 1)
    return total


def _bytes(io: IoEntry, dims: Mapping[str, int]) -> int:
    total = ITEM_BYTES[io.dtype]
    for dim in io.shape:
        total *= dims[dim] if isinstance(dim, str) else dim
    return total
