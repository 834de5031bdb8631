# SPDX-License-Identifier: Apache-2.0
"""What the parts of a pipeline beside its transformer are loaded as, and what memory they take."""

from __future__ import annotations

from math import prod
from pathlib import Path

import torch

from ...bundle.safetensors_header import read_header

__all__ = ["loaded_bytes", "part_dtypes"]

FLOAT32_TEXT_ENCODER_BYTES = 2 << 30
"""A text encoder whose files are larger is loaded in bfloat16."""


def part_dtypes(folder: Path) -> dict[str, torch.dtype]:
    """Choose what a pipeline's parts are loaded in: float32, but large text encoders."""
    dtypes = {"default": torch.float32}
    for part in sorted(folder.glob("text_encoder*")):
        size = sum(f.stat().st_size for f in part.glob("*.safetensors"))
        is_small = size <= FLOAT32_TEXT_ENCODER_BYTES
        dtypes[part.name] = torch.float32 if is_small else torch.bfloat16
    return dtypes


def loaded_bytes(folder: Path) -> dict[str, int]:
    """Return the bytes that each part of a pipeline takes once `Generator` has loaded it.

    Args:
        folder: A pipeline in diffusers layout.

    Raises:
        CheckpointError: a weight file's header can't be read.
    """
    dtypes = part_dtypes(folder)
    found: dict[str, int] = {}
    for file in sorted(folder.glob("*/*.safetensors")):
        part = file.parent.name
        if part.startswith("transformer"):
            continue
        item_bytes = dtypes.get(part, dtypes["default"]).itemsize
        count = sum(prod(t.shape) for t in read_header(file).values())
        found[part] = found.get(part, 0) + item_bytes * count
    return found
