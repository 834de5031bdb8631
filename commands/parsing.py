# SPDX-License-Identifier: Apache-2.0
"""How a command line is parsed: ``~`` in paths, and usage errors as objects with ``--json``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from ..core.errors import FreewheelError
from .screen import Screen

__all__ = ["Command", "Commands", "UsageError"]

PATH_LIKE = {"cache", "config", "lora", "model"}
"""Parameters that may be a path or a name, and are read as text."""


class UsageError(FreewheelError):
    """A command line that can't be parsed."""

    code, exit_code = "usage", 2


class Command(TyperCommand):
    """A command whose paths may begin with ``~``, which shells leave alone in ``--out=~/x``."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]  # typer's own base of Context
        """Parse the command line and expand ``~`` in every path."""
        rest = super().parse_args(ctx, args)
        for name, value in ctx.params.items():
            if isinstance(value, Path) or name in PATH_LIKE:
                ctx.params[name] = _expanded(value)
        return rest


class Commands(TyperGroup):
    """The group of commands: ``--json`` prints an object for usage errors too."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run a command line; see `typer.core.TyperGroup.main`."""
        arguments = sys.argv[1:] if args is None else list(args)
        run = partial(
            super().main,
            arguments,
            prog_name,
            complete_var,
            windows_expand_args=windows_expand_args,
            **extra,
        )
        if "--json" not in arguments:
            return run(standalone_mode=standalone_mode)
        try:
            code = run(standalone_mode=False)
        except typer.TyperException as error:
            context = getattr(error, "ctx", None)
            command = context.command_path if context is not None else "freewheel"
            fault = UsageError(command, error.format_message().rstrip("."), f"see {command} --help")
            Screen(as_json=True).error(fault)
            raise SystemExit(fault.exit_code) from None
        raise SystemExit(code or 0)


def _expanded(value: Any) -> Any:
    """Replace a leading ``~`` of a path, a text, or each of a list."""
    if isinstance(value, list):
        return [_expanded(v) for v in value]
    if not isinstance(value, str | Path):
        return value
    # Path.expanduser raises where no such user is; such a name may be a file's.
    return type(value)(os.path.expanduser(value))  # noqa: PTH111
