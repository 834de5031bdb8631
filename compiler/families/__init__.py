# SPDX-License-Identifier: Apache-2.0
"""The families table: every diffusers transformer class that can be cut."""

from __future__ import annotations

from ...configs.errors import CheckpointError, nearest
from .base import Cut, Family, ModelInput, Segment, Stage
from .flux import FLUX
from .hunyuan import HUNYUAN
from .ltx import LTX
from .wan import WAN

__all__ = ["FAMILIES", "Cut", "Family", "ModelInput", "Segment", "Stage", "family_of"]

FAMILIES: tuple[Family, ...] = (WAN, LTX, FLUX, HUNYUAN)


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
