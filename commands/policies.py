# SPDX-License-Identifier: Apache-2.0
"""`freewheel policies`: show the policies there are."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import DebugOption, JsonOption
from .screen import reporting

__all__ = ["policies"]


def policies(
    names: Annotated[list[str] | None, typer.Argument(help="Policies to show; none: all.")] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show every cache policy: parameters with ranges, memory, what it looks at and when it decides.

    Example: freewheel policies teacache
    """
    with reporting("policies", as_json, False, debug) as screen:
        from ..policies.catalogue import describe_guard, describe_policies, render

        described, faults = describe_policies(names or ())
        for fault in faults:
            screen.warn(str(fault))
        guard = describe_guard()
        screen.result({"policies": described, "guard": guard}, render(described, guard))
