# SPDX-License-Identifier: Apache-2.0
"""The families table: every diffusers transformer class that can be cut.

Four are restated by hand. Each other one is a row of `compiler.cut.models`, and its cut is found in
its own forward.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import diffusers

from ...core.dtypes import Precision
from ...core.errors import CheckpointError, nearest
from ..cut.declare import declare
from ..cut.declared import Cut, Family, ModelInput, Segment, Stage, StoredDtype
from ..cut.models import MODELS, Row
from .flux import FLUX
from .hunyuan import HUNYUAN
from .layers import on_meta
from .ltx import LTX
from .wan import WAN

__all__ = ["FAMILIES", "Cut", "Family", "ModelInput", "Segment", "Stage", "family_of"]

BY_HAND = (WAN, LTX, FLUX, HUNYUAN)


def _cut_by_row(
    row: Row, config: Mapping[str, Any], precision: Precision, stored: StoredDtype
) -> Cut:
    """Cut a transformer by what its own forward does."""
    model_class = getattr(diffusers, row.model)
    model = on_meta(model_class, config)
    cut = declare(row, model_class, dict(model.config), precision, stored)
    return replace(cut, unread=frozenset(model.state_dict()) - cut.weights().keys())


def _found() -> tuple[Family, ...]:
    by_hand = {family.transformer_class for family in BY_HAND}
    return tuple(
        Family(row.name, row.model, row.pipelines, partial(_cut_by_row, row))
        for row in MODELS
        if row.name and row.model not in by_hand
    )


FAMILIES: tuple[Family, ...] = (*BY_HAND, *_found())


def family_of(transformer_class: str, where: str) -> Family:
    """Return the family that cuts ``transformer_class``.

    Raises:
        CheckpointError: no family does; ``where`` names the config it was read from.
    """
    for family in FAMILIES:
        if family.transformer_class == transformer_class:
            return family
    known = [f.transformer_class for f in FAMILIES]
    raise CheckpointError(
        where,
        f"'_class_name' is '{transformer_class}', which no family cuts",
        nearest(transformer_class, known),
    )
