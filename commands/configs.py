# SPDX-License-Identifier: Apache-2.0
"""`freewheel configs`: show the caching configs that ship."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from .options import DebugOption, JsonOption
from .screen import reporting

__all__ = ["configs"]


def configs(
    names: Annotated[
        list[str] | None, typer.Argument(help="Configs to show whole; none: a table of all.")
    ] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show the caching configs that ship: policy, model, size and steps of each.

    Example: freewheel configs wan_t2v_1_3b_tea_480p
    """
    with reporting("configs", as_json, False, debug) as screen:
        from ..configs.catalogue import COLUMNS, cells, describe_configs
        from ..tuning.table import markdown_table

        described = describe_configs(names or ())
        lines = [markdown_table(COLUMNS, [cells(entry) for entry in described])]
        if names:
            lines = [json.dumps(entry, indent=2, ensure_ascii=False) for entry in described]
        screen.result({"configs": described}, lines)
