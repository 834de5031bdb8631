# SPDX-License-Identifier: Apache-2.0
"""Hold calls to the signatures of a pybind11 class, which stand in its docstrings."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

SIGNATURE = re.compile(
    r"^(?:\d+\. )?\w+\(self: [^,)]+(?:, (?P<parameters>.*))?\) -> (?P<result>.+)$"
)
NEXT = re.compile(r", (?=\w+: )")


class Parameter(NamedTuple):
    name: str
    kind: str
    default: str | None


class Signature(NamedTuple):
    parameters: tuple[Parameter, ...]
    result: str


def signatures(member: Any) -> tuple[Signature, ...]:
    """Read every overload of a method."""
    found = _read(member.__doc__ or "")
    assert found, f"no signature in the docstring of {member}"
    return found


@functools.cache
def _read(text: str) -> tuple[Signature, ...]:
    return tuple(_signature(m) for m in map(SIGNATURE.match, text.splitlines()) if m)


def _signature(match: re.Match[str]) -> Signature:
    parameters = []
    for text in NEXT.split(match["parameters"] or ""):
        if text:
            declared, _, default = text.partition(" = ")
            name, _, kind = declared.partition(": ")
            parameters.append(Parameter(name, kind, default or None))
    return Signature(tuple(parameters), match["result"])


def check_call(member: Any, given: Sequence[Any], named: Mapping[str, Any]) -> None:
    """Raise TypeError, as pybind11 would, unless a call fits one overload of a method."""
    known = signatures(member)
    if not any(_fits(signature, given, named) for signature in known):
        raise TypeError(f"{member.__name__}{tuple(given)} {dict(named)} fits none of {known}")


def _fits(signature: Signature, given: Sequence[Any], named: Mapping[str, Any]) -> bool:
    parameters = signature.parameters
    if len(given) > len(parameters):
        return False
    bound = {p.name: a for p, a in zip(parameters, given, strict=False)}
    if bound.keys() & named.keys() or named.keys() - {p.name for p in parameters}:
        return False
    bound |= named
    return all(
        _is_kind(bound[p.name], p.kind) or (bound[p.name] is None and p.default == "None")
        if p.name in bound
        else p.default is not None
        for p in parameters
    )


def _is_kind(argument: Any, kind: str) -> bool:
    plain = re.split(r"[.:]", kind.partition("[")[0])[-1].lower()
    if plain in ("supportsint", "int"):
        return isinstance(argument, int)
    if plain in ("supportsfloat", "float"):
        return isinstance(argument, int | float)
    if plain in ("str", "bool", "tuple", "list", "bytes"):
        return type(argument).__name__ == plain
    if plain == "buffer":
        return memoryview(argument) is not None
    if plain == "sequence":
        return isinstance(argument, Sequence)
    if plain == "dims" and isinstance(argument, tuple | list):
        return True  # pybind11 converts these
    real = getattr(type(argument), "_real", type(argument))
    return any(base.__name__.lower() == plain for base in real.__mro__)
