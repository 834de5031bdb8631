# SPDX-License-Identifier: Apache-2.0
"""Check that a `Target` fits a graph and a backend before anything is compiled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..core.errors import BuildError, nearest
from .base import Target, TensorSpec

__all__ = ["check_options", "check_precision", "check_profile"]


def check_precision(target: Target, known: Sequence[str], graph: str, hint: str) -> None:
    """Refuse a precision that the backend does not compile.

    Raises:
        BuildError: the target's precision is not among ``known``.
    """
    if target.precision not in known:
        what = f"precision {target.precision} is not among the backend's: {', '.join(known)}"
        raise BuildError(graph, what, hint)


def check_options(
    target: Target, known: Sequence[str], graph: str
) -> Mapping[str, str | int | bool]:
    """Return the options of ``target``.

    Raises:
        BuildError: one of them is not among ``known``.
    """
    for name in target.options:
        if name not in known:
            where = f"{graph}, option '{name}'"
            hint = nearest(name, list(known)) if known else "this backend has none"
            raise BuildError(where, "no such build option", hint)
    return target.options


def check_profile(
    target: Target, inputs: Mapping[str, TensorSpec], graph: str
) -> dict[str, Sequence[tuple[int, ...]]]:
    """Pick the optimization profiles of a graph's dynamic inputs.

    Raises:
        BuildError: one is missing, has another rank than its input, contradicts a fixed dimension
            or the range of the same dimension in another input.
    """
    profile: dict[str, Sequence[tuple[int, ...]]] = {}
    ranges: dict[str, tuple[tuple[int, ...], str]] = {}
    for name, spec in inputs.items():
        if not any(isinstance(dim, str) for dim in spec.shape):
            continue
        where = f"{graph}, input '{name}'"
        if name not in target.profiles:
            dims = ", ".join(str(dim) for dim in spec.shape)
            what = f"shape [{dims}] is dynamic but has no optimization profile"
            raise BuildError(where, what, "give its smallest, usual and largest shape")
        shapes = target.profiles[name]
        if any(len(shape) != len(spec.shape) for shape in shapes):
            found = [list(shape) for shape in shapes]
            what = f"profile {found} has not the input's {len(spec.shape)} dimensions"
            raise BuildError(where, what, f"give shapes like [{', '.join(map(str, spec.shape))}]")
        for dim, *sizes in zip(spec.shape, *shapes, strict=True):
            _check_range(dim, tuple(sizes), where, ranges, name)
        profile[name] = shapes
    return profile


def _check_range(
    dim: int | str,
    sizes: tuple[int, ...],
    where: str,
    ranges: dict[str, tuple[tuple[int, ...], str]],
    name: str,
) -> None:
    smallest, usual, largest = sizes
    if isinstance(dim, int) and set(sizes) != {dim}:
        what = f"profile has {sizes} where the graph is fixed at {dim}"
        raise BuildError(where, what, f"give {dim} there")
    if not 0 < smallest <= usual <= largest:
        what = f"profile of '{dim}' is {sizes}, not smallest <= usual <= largest"
        raise BuildError(where, what, "give min:opt:max in rising order")
    if isinstance(dim, str):
        known, by = ranges.setdefault(dim, (sizes, name))
        if known != sizes:
            what = f"profile of '{dim}' is {sizes}, but {known} for input '{by}'"
            raise BuildError(where, what, f"give one range for '{dim}'")
