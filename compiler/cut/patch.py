# SPDX-License-Identifier: Apache-2.0
"""Lines of a model's source that can't be traced, and what is traced in their place.

A patch names the lines that it was written for by their digest, so that a diffusers that has
changed them is refused rather than patched into something else. What a patch computes is proved
like every cut: against the transformer as it stands.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
import textwrap
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any
from unittest import mock

from ...core.errors import ExportError

__all__ = ["Patch", "patched"]


@dataclass(frozen=True)
class Patch:
    """Lines of one method, and what is traced in their place.

    Attributes:
        method: ``Class.method``, by the name that the module of the transformer's class has for it.
        first: How the first of the lines begins.
        until: How the line behind the last one begins.
        digest: First 12 hexadecimal digits of the SHA-256 of the lines, without their indentation.
        lines: What stands for them, without indentation.
        rounds: Whether they are left out for rounding in float32 too, and so in the transformer that
            a cut is compared with.
    """

    method: str
    first: str
    until: str
    digest: str
    lines: str
    rounds: bool = False


@contextmanager
def patched(model_class: Any, patches: Iterable[Patch]) -> Iterator[None]:
    """Let the classes of a transformer's module compute what patches say, until the context ends.

    Args:
        model_class: The transformer's class.
        patches: In the order in which they are put in.

    Raises:
        ExportError: lines are not what a patch was written for.
    """
    with ExitStack() as stack:
        if patches:
            module = inspect.getmodule(model_class)
            assert module is not None, "a class of diffusers lies in a module"
            for method in dict.fromkeys(patch.method for patch in patches):
                own = [patch for patch in patches if patch.method == method]
                owner = getattr(module, method.partition(".")[0], None)
                name = method.partition(".")[2]
                if not hasattr(owner, name):
                    raise _changed(module, own[0], "is not there")
                made = _compiled(getattr(owner, name), own)
                stack.enter_context(mock.patch.object(owner, name, made))
        yield


def _compiled(method: FunctionType, patches: Iterable[Patch]) -> Any:
    """Return a method with patches put in; what is not patched keeps its line numbers if it can."""
    module = sys.modules[method.__module__]
    source, start = inspect.getsourcelines(method)
    lines = textwrap.dedent("".join(source)).splitlines()
    for patch in patches:
        lines = _put_in(module, lines, patch)
    text = "\n" * (start - 1) + "\n".join(lines)
    names = dict(vars(module))
    exec(compile(text, inspect.getfile(method), "exec"), names)
    return names[method.__name__]


def _put_in(module: ModuleType, lines: list[str], patch: Patch) -> list[str]:
    stripped = [line.strip() for line in lines]
    try:
        first = next(i for i, line in enumerate(stripped) if line.startswith(patch.first))
        end = next(i for i in range(first, len(lines)) if stripped[i].startswith(patch.until))
    except StopIteration:
        raise _changed(module, patch, "has no such lines") from None
    if (found := digest_of(lines[first:end])) != patch.digest:
        raise _changed(module, patch, f"has other lines (digest {found}, not {patch.digest})")
    indentation = lines[first][: len(lines[first]) - len(stripped[first])]
    made = textwrap.indent(patch.lines.strip("\n"), indentation).splitlines()
    return [*lines[:first], *made, *[""] * (end - first - len(made)), *lines[end:]]


def digest_of(lines: Iterable[str]) -> str:
    """Return what `Patch.digest` calls lines by."""
    text = "\n".join(line.strip() for line in lines).strip()
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _changed(module: ModuleType, patch: Patch, what: str) -> ExportError:
    return ExportError(
        f"{module.__name__}.{patch.method}",
        f"{what}: a patch that lets it be traced replaces the lines from '{patch.first}' until "
        f"'{patch.until}'",
        "install the version of diffusers that constraints.txt names, or report this",
    )
