# SPDX-License-Identifier: Apache-2.0
"""What the command line shows: results on stdout; progress, tables and warnings on stderr."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from ..core.errors import FreewheelError

__all__ = ["SCHEMA_VERSION", "Screen", "reporting"]

SCHEMA_VERSION = 1
PIPE_WIDTH = 120


class Screen:
    """One command's output.

    Args:
        as_json: Print one JSON object on stdout instead of text.
        quiet: Show no progress and no tables; warnings stay.
    """

    def __init__(self, *, as_json: bool = False, quiet: bool = False) -> None:
        self.as_json, self.quiet = as_json, quiet
        self._err = Console(stderr=True, highlight=False)
        if not self._err.is_terminal:
            self._err = Console(stderr=True, highlight=False, width=PIPE_WIDTH)
        self._phase = ""
        self._bar: Progress | None = None
        self._task: Any = None

    def result(self, data: dict[str, Any], lines: Sequence[str] = ()) -> None:
        """Print the result: ``data`` with --json, else ``lines``."""
        if self.as_json:
            sys.stdout.write(
                json.dumps({"schema_version": SCHEMA_VERSION, **data}, allow_nan=False) + "\n"
            )
        else:
            for line in lines:
                sys.stdout.write(line + "\n")
        sys.stdout.flush()

    def error(self, error: FreewheelError) -> None:
        """Print an expected failure: an object on stdout with --json, else one message."""
        if self.as_json:
            parts = {
                "code": error.code,
                "message": str(error),
                "where": error.where,
                "hint": error.hint,
            }
            sys.stdout.write(json.dumps({"schema_version": SCHEMA_VERSION, "error": parts}) + "\n")
        else:
            self._err.print("[bold red]error:[/] ", end="")
            self._err.print(str(error), markup=False, soft_wrap=True)

    def note(self, text: str) -> None:
        """Show a line on stderr unless quiet."""
        if not self.quiet:
            self._err.print(text, markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """Show a warning on stderr, always."""
        self._err.print("[yellow]warning:[/] ", end="")
        self._err.print(text, markup=False, soft_wrap=True)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Show a table on stderr unless quiet; columns after the first align right."""
        if self.quiet:
            return
        table = Table(title=title, title_justify="left")
        for index, column in enumerate(columns):
            table.add_column(column, justify="left" if index == 0 else "right")
        for row in rows:
            table.add_row(*(_cell(v) for v in row))
        self._err.print(table)

    @contextmanager
    def progress(self) -> Iterator[Screen]:
        """Show phases as bars on a terminal, else as one line each."""
        if self.quiet or not self._err.is_terminal:
            yield self
            return
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("[dim]left"), TimeRemainingColumn(), TextColumn("[dim]{task.fields[what]}"),
        )  # fmt: skip
        with Progress(*columns, console=self._err) as bar:
            self._bar = bar
            try:
                yield self
            finally:
                self._bar = None

    def phase(self, name: str, total: int) -> None:
        """Begin a phase (see `freewheel.core.progress.Progress`)."""
        if self._bar is not None:
            self._task = self._bar.add_task(name, total=total, what="")
        elif not self.quiet:
            self._err.print(f"{name}: {total}", markup=False)

    def advance(self, what: str, steps: int = 1) -> None:
        """Report a step of the phase."""
        if self._bar is not None:
            self._bar.update(self._task, advance=steps, what=what)


@contextmanager
def reporting(
    command: str, as_json: bool, quiet: bool, debug: bool, *, remedy: str = "run it again"
) -> Iterator[Screen]:
    """Turn expected errors into one message and their exit code.

    Args:
        command: The verb.
        as_json: See `Screen`.
        quiet: See `Screen`.
        debug: Print the traceback of an expected error too.
        remedy: What to do after an interruption.

    Raises:
        typer.Exit: something failed; carries the exit code.
    """
    screen = Screen(as_json=as_json, quiet=quiet or as_json)
    try:
        yield screen
    except FreewheelError as error:
        if debug:
            traceback.print_exc()
        screen.error(error)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        screen.error(FreewheelError(command, "was interrupted", remedy))
        raise typer.Exit(130) from None


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 0.01 else f"{value:.2f}"
    return str(value)
