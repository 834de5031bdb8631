# SPDX-License-Identifier: Apache-2.0
"""The families table: every diffusers transformer class that can be cut.

Four are restated by hand. Each other one is a row of `compiler.cut.models`, and its cut is found in
its own forward.
"""

from __future__ import annotations

from functools import partial

from ...core.errors import CheckpointError, nearest
from ..cut.declared import Cut, Family, ModelInput, Segment, Stage
from ..cut.models import MODELS
from ..cut.transformer import cut_transformer
from .flux import FLUX
from .hunyuan import HUNYUAN
from .ltx import LTX
from .wan import WAN

__all__ = ["FAMILIES", "Cut", "Family", "ModelInput", "Segment", "Stage", "family_of"]

BY_HAND = (WAN, LTX, FLUX, HUNYUAN)


def _found() -> tuple[Family, ...]:
    by_hand = {family.transformer_class for family in BY_HAND}
    return tuple(
        Family(row.name, row.model, row.pipelines, partial(cut_transformer, row), is_found=True)
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
