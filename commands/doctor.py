# SPDX-License-Identifier: Apache-2.0
"""`freewheel doctor`: show what this machine can do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import DebugOption, JsonOption
from .screen import reporting

__all__ = ["doctor"]


def doctor(
    folder: Annotated[
        Path, typer.Option(help="Folder on the disk whose free space matters.")
    ] = Path(),
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show backends (and why not), packages, CPU, GPU, memory, disk and tools of this machine.

    Example: freewheel doctor --json
    """
    with reporting("doctor", as_json, False, debug) as screen:
        from ..engines.doctor import examine, render

        found = examine(folder)
        screen.result(found, render(found))
