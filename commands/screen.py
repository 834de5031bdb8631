# SPDX-License-Identifier: Apache-2.0
"""What the command line shows: results on stdout; progress, tables and warnings on stderr."""

from __future__ import annotations

import json
import logging
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
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from ..core.cells import cell
from ..core.errors import FreewheelError, RankError
from ..core.launch import launch

__all__ = ["SCHEMA_VERSION", "Screen", "may_speak", "reporting"]

SCHEMA_VERSION = 1
PIPE_WIDTH = 120

SHARED = ("run", "bench", "calibrate", "tune")
"""Verbs that several ranks share; the others are the work of one process."""

MEMORY_SIGNS = (
    "out of memory",
    "can't allocate memory",
    "failed to allocate",
    "bad_alloc",
    "bad allocation",
)
"""What PyTorch, ONNX Runtime, OpenVINO and C++ say, in lower case."""

MEMORY_HINT = "ask for a smaller size, free memory, or keep weights in host memory with --offload"


class RateColumn(ProgressColumn):
    """Steps per second of a phase, or seconds per step of a slow one."""

    def render(self, task: Task) -> Text:
        """Return the rate; nothing before the first step."""
        speed = task.speed or task.finished_speed
        if not speed:
            return Text("")
        return Text(f"{speed:.1f}/s" if speed >= 1 else f"{1 / speed:.1f} s each", style="dim")


class Screen:
    """One command's output.

    Args:
        as_json: Print one JSON object on stdout instead of text.
        quiet: Show no progress and no tables; warnings stay.
        silent: Show errors alone, as all ranks of a job but one do.
    """

    def __init__(self, *, as_json: bool = False, quiet: bool = False, silent: bool = False) -> None:
        self.as_json, self.quiet, self._silent = as_json, quiet or silent, silent
        self._err = Console(stderr=True, highlight=False)
        if not self._err.is_terminal:
            self._err = Console(stderr=True, highlight=False, width=PIPE_WIDTH)
        self._warned: set[str] = set()
        self._phase = ""
        self._bar: Progress | None = None
        self._task: Any = None

    def result(self, data: dict[str, Any], lines: Sequence[str] = ()) -> None:
        """Print the result: ``data`` with --json, else ``lines``."""
        if self._silent:
            return
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
        """Show a warning on stderr, quiet or not; one text once."""
        if self._silent or text in self._warned:
            return
        self._warned.add(text)
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
            table.add_row(*(cell(v) for v in row))
        self._err.print(table)

    @contextmanager
    def progress(self) -> Iterator[Screen]:
        """Show phases as bars on a terminal, else as one line each."""
        if self.quiet or not self._err.is_terminal:
            yield self
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            RateColumn(),
            TimeElapsedColumn(),
            TextColumn("[dim]left"),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[what]}"),
        )
        with Progress(*columns, console=self._err) as bar:
            self._bar = bar
            try:
                yield self
            finally:
                self._bar = None

    def phase(self, name: str, total: int | None = None) -> None:
        """Begin a phase (see `freewheel.core.progress.Progress`)."""
        if self._bar is not None:
            self._task = self._bar.add_task(name, total=total, what="")
        elif not self.quiet:
            self._err.print(name if total is None else f"{name}: {total}", markup=False)

    def advance(self, what: str, steps: int = 1, total: int | None = None) -> None:
        """Report a step of the phase, and how many it has where that was not known before."""
        if self._bar is not None:
            self._bar.update(self._task, advance=steps, what=what, total=total)


def _is_no_fallback(record: logging.LogRecord) -> bool:
    return "falling back to" not in record.getMessage()


@contextmanager
def reporting(
    command: str, as_json: bool, quiet: bool, debug: bool, *, remedy: str = "run it again"
) -> Iterator[Screen]:
    """Turn expected errors into one message and their exit code.

    Of several ranks one speaks: rank 0 of what goes well, the first to fail of what does not.

    Args:
        command: The verb.
        as_json: See `Screen`.
        quiet: See `Screen`.
        debug: Print the traceback of an expected error too.
        remedy: What to do after an interruption.

    Raises:
        typer.Exit: something failed; carries the exit code.
    """
    # Said of each image processor that diffusers imports by name, where torchvision is missing.
    logging.getLogger("transformers.utils.import_utils").addFilter(_is_no_fallback)
    place = launch()
    silent = place is not None and place.rank > 0
    screen = Screen(as_json=as_json, quiet=quiet or as_json, silent=silent)
    try:
        if place is not None and command not in SHARED:
            raise RankError(
                f"{command}, {place.size} ranks",
                "is the work of one process",
                f"start it alone; {', '.join(SHARED)} are shared out",
            )
        yield screen
    except FreewheelError as error:
        if debug:
            traceback.print_exc()
        if may_speak():
            screen.error(error)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        if place is not None:
            command = f"{command}, rank {place.rank}"
            remedy = (
                f"{remedy}; a launcher ends all ranks where one fails, and its last lines name it"
            )
        if may_speak():
            screen.error(FreewheelError(command, "was interrupted", remedy))
        raise typer.Exit(130) from None
    except (MemoryError, RuntimeError) as error:
        if not is_memory_fault(error):
            raise
        where = command if place is None else f"{command}, rank {place.rank}"
        if may_speak():
            screen.error(
                FreewheelError(where, f"ran out of memory: {first_line(error)}", MEMORY_HINT)
            )
        raise typer.Exit(FreewheelError.exit_code) from None


def may_speak() -> bool:
    """Tell whether this process is to say what went wrong: the first rank that asks."""
    if launch() is None:
        return True
    from ..runtime.distributed.ranks import claim_error

    return claim_error()


def is_memory_fault(error: Exception) -> bool:
    """Tell whether PyTorch, an engine or Python itself found no memory."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or any(sign in said for sign in MEMORY_SIGNS)


def first_line(error: Exception) -> str:
    """Return the first line of what an error says, or its class."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
