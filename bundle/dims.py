# SPDX-License-Identifier: Apache-2.0
"""Named dimensions: read from what the caller hands in, derived where the manifest says how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

from ..core.errors import BundleError, RequestError
from .manifest import MAX_SIZE, IoEntry, LatentScale, LimitEntry, Manifest, SumTerm

__all__ = [
    "all_dims",
    "check_limits",
    "check_video",
    "derive_dims",
    "divisor",
    "least",
    "match_dims",
    "nearest_video",
    "shape_of",
    "summed",
]


def match_dims(name: str, entry: IoEntry, shape: Sequence[int]) -> dict[str, int]:
    """Match a tensor's shape with its declaration.

    Args:
        name: Input name, for the message.
        entry: Declared dtype and shape.
        shape: Shape found.

    Returns:
        Size of each named dimension.

    Raises:
        RequestError: rank or a fixed dimension differs, or a dimension is 0.
    """
    declared = f"[{', '.join(map(str, entry.shape))}]"
    sizes: dict[str, int] = {}
    fits = len(shape) == len(entry.shape) and all(size > 0 for size in shape)
    for dim, size in zip(entry.shape, shape, strict=False):
        fits &= sizes.setdefault(dim, size) == size if isinstance(dim, str) else dim == size
    if not fits:
        raise RequestError(
            f"input '{name}'",
            f"has shape {list(shape)}, the bundle takes {declared}",
            "give latents and embeddings of the model that the bundle was built from",
        )
    return sizes


def derive_dims(manifest: Manifest, sizes: Mapping[str, int]) -> dict[str, int]:
    """Add the manifest's derived dimensions (such as ``tokens``) and sums to the sizes known.

    One that derives from a size not known yet (a prompt input's) is left out.

    Raises:
        RequestError: a size is not divisible by its patch, or an input has another one than what
            it derives from.
    """
    dims = dict(sizes)
    for name, factors in manifest.dims.items():
        if any(dim not in dims for dim, _ in factors):
            continue
        product = 1
        for dim, divisor in factors:
            if dims[dim] % divisor:
                raise RequestError(
                    f"dimension '{dim}'",
                    f"is {dims[dim]}, which {divisor} does not divide",
                    "choose a size that the model's patches divide",
                )
            product *= dims[dim] // divisor
        if dims.setdefault(name, product) != product:
            parts = " · ".join(dim for dim, _ in factors)
            raise RequestError(
                f"dimension '{name}'",
                f"is {dims[name]}, but {parts} give {product}",
                "give sizes that belong to the latents",
            )
    for name, size in summed(manifest.sums, dims).items():
        if dims.setdefault(name, size) != size:
            raise RequestError(
                f"dimension '{name}'",
                f"is {dims[name]}, but what it is a sum of gives {size}",
                "give sizes that belong to the latents",
            )
    check_limits(manifest.limits, dims)
    return dims


def check_limits(limits: Mapping[str, LimitEntry], dims: Mapping[str, int]) -> None:
    """Refuse sizes that a model has no positions for.

    Args:
        limits: Dimension → its largest size, and what of the model ends there.
        dims: Sizes; of a dimension that is not known yet nothing is said.

    Raises:
        RequestError: one is too large.
    """
    for name, limit in limits.items():
        if dims.get(name, 0) > limit.most:
            raise RequestError(
                f"dimension '{name}'",
                f"is {dims[name]}, the model has positions for {limit.most}: {limit.where}",
                "choose a smaller size",
            )


def all_dims(
    factors: Mapping[str, Sequence[tuple[str, int]]],
    sums: Mapping[str, Sequence[SumTerm]],
    sizes: Mapping[str, int],
) -> dict[str, int]:
    """Add what derives from sizes that are all known, and what derives from their sums.

    Args:
        factors: Derived dimension → its factors, each a size and its divisor.
        sums: Dimension → what it is the sum of.
        sizes: Of everything that does not derive.
    """
    dims = dict(sizes)
    for _ in ("of sizes", "of sums"):
        for name, parts in factors.items():
            if all(dim in dims for dim, _ in parts):
                dims[name] = prod(dims[dim] // by for dim, by in parts)
        dims |= summed(sums, dims)
    return dims


def summed(sums: Mapping[str, Sequence[SumTerm]], dims: Mapping[str, int]) -> dict[str, int]:
    """Return the dimensions that are sums of known ones, of numbers, and of padded ones.

    Raises:
        RequestError: one is less than 1, as a video of one frame has none but the first.
    """
    found = {name: [_term(term, dims) for term in terms] for name, terms in sums.items()}
    sizes = {name: sum(t for t in terms if t) for name, terms in found.items() if None not in terms}
    for name, size in sizes.items():
        if size < 1:
            raise RequestError(
                f"dimension '{name}'",
                f"is {size}, and follows from the sizes of the run",
                "choose larger ones, such as more frames",
            )
    return sizes


def _term(term: SumTerm, dims: Mapping[str, int]) -> int | None:
    """Return a term's value: of a pair, the dimension rounded up to a multiple; None: not known."""
    if isinstance(term, int):
        return term
    name, multiple = (term, 1) if isinstance(term, str) else term
    size = dims.get(name)
    return None if size is None else -(-size // multiple) * multiple


def divisor(dims: Mapping[str, Sequence[tuple[str, int]]], name: str) -> int:
    """Return what a size must be a multiple of: the largest patch that a derived dimension makes.

    Args:
        dims: Derived dimension → its factors, each a size and its divisor.
        name: Of the size.
    """
    return max((d for factors in dims.values() for dim, d in factors if dim == name), default=1)


def check_video(
    sizes: Mapping[str, int],
    scale: LatentScale,
    dims: Mapping[str, Sequence[tuple[str, int]]],
) -> None:
    """Refuse a video of which latents, or patches of them, would not be whole.

    Args:
        sizes: Its ``height``, ``width`` and ``frames``, or some of them.
        scale: What one latent stands for.
        dims: Derived dimension → its factors, each a size and its divisor.

    Raises:
        RequestError: one is too small, or between two that fit.
    """
    for name, size in sizes.items():
        first, step = _video_steps(name, scale, dims)
        if size >= first and (size - first) % step == 0:
            continue
        more, patch = first % step, divisor(dims, name)
        found = f"is not {more} more than a multiple" if more else "is no multiple"
        why = f": {patch} latent frames are a patch" if name == "frames" and patch > 1 else ""
        raise RequestError(
            f"--{name} {size}",
            f"{found} of {step}{why}",
            f"use {nearest_video(name, size, scale, dims)}",
        )


def nearest_video(
    name: str, size: int, scale: LatentScale, dims: Mapping[str, Sequence[tuple[str, int]]]
) -> int:
    """Return the nearest height, width or frames that `check_video` lets pass."""
    first, step = _video_steps(name, scale, dims)
    return max(0, (size - first + step // 2) // step) * step + first


def _video_steps(
    name: str, scale: LatentScale, dims: Mapping[str, Sequence[tuple[str, int]]]
) -> tuple[int, int]:
    """Return the least of a size, and what lies between two that fit.

    The first latent frame stands for one frame.
    """
    by = scale.frames if name == "frames" else scale.pixels
    step = by * divisor(dims, name)
    return step - by + 1 if name == "frames" else step, step


def least(sums: Mapping[str, Sequence[SumTerm]], name: str) -> int:
    """Return the smallest size at which sums that take a number from it are at least 1.

    Args:
        sums: Dimension → what it is the sum of.
        name: Of the size.
    """
    numbers = [
        (terms.count(name), sum(term for term in terms if isinstance(term, int)))
        for terms in sums.values()
    ]
    return max((-((number - 1) // times) for times, number in numbers if times), default=1)


def shape_of(entry: IoEntry, dims: Mapping[str, int]) -> tuple[int, ...]:
    """Return the shape of a declared tensor for these sizes.

    Raises:
        BundleError: it has a dimension whose size nothing tells.
        RequestError: it has more elements than the bundle format allows.
    """
    unknown = [d for d in entry.shape if isinstance(d, str) and d not in dims]
    if unknown:
        raise BundleError(
            f"dimension '{unknown[0]}'", "has a size that nothing tells", "build the bundle again"
        )
    shape = tuple(dims[d] if isinstance(d, str) else d for d in entry.shape)
    if prod(shape) > MAX_SIZE:
        raise RequestError(
            f"tensor [{', '.join(map(str, entry.shape))}]",
            f"is absurdly large: {list(shape)}",
            "choose a smaller size",
        )
    return shape
