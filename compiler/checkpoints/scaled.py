# SPDX-License-Identifier: Apache-2.0
"""Undo the scales of 8-bit weights, as ComfyUI, LightX2V and ModelOpt write them, when they are read.

A scaled weight is ``stored · scale``, the scale one number or one of each output row. Forms that mean
anything else (blocks, zero points, two levels of scales) are left as they are, for `check_tensors` to
refuse by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ...core.errors import CheckpointError
from .sources import MadeTensor, Weight, read_weight

__all__ = ["without_scales"]

FLOAT8 = ("float8_e4m3fn", "float8_e5m2")
SCALES = ("scale_weight", "weight_scale")
"""Name of a scale beside its ``weight``: ComfyUI's first form; LightX2V's, ModelOpt's and ComfyUI's."""

OF_ACTIVATIONS = ("scale_input", "input_scale")
"""Name of what a kernel divides activations by before it rounds them to 8 bits, which none here does."""

MARK = "scaled_fp8"
FORMAT = "comfy_quant"
"""Name of JSON, as bytes beside a ``weight``, that says in which format it is."""

WIDE = "bfloat16"
"""In which graphs take a scaled weight where they have no dtype of their own for it."""


def without_scales(
    stored: Mapping[str, Weight], where: Path
) -> tuple[dict[str, Weight], tuple[str, ...]]:
    """Return the tensors with scaled weights multiplied out, and notes for people.

    Args:
        stored: Tensors by the names of their files.
        where: The file or folder, for messages.

    Raises:
        CheckpointError: a weight says that it is in a format that is not float8.
    """
    made: dict[str, Weight] = {}
    used: set[str] = set()
    for name in stored:
        base, _, last = name.rpartition(".")
        weight = None if f"{base}.weight" in made else stored.get(f"{base}.weight")
        if last in SCALES and weight is not None and _is_scale_of(stored[name], weight, last):
            made[f"{base}.weight"] = MadeTensor(
                WIDE, weight.shape, "scaled 8 bits", partial(_multiplied, weight, stored[name])
            )
            used.add(name)
    dropped = {n for n in stored if _last(n) in OF_ACTIVATIONS and _base(n) + ".weight" in made}
    for name in stored:
        if _last(name) == FORMAT and _base(name) + ".weight" in made:
            _check_format(stored[name], f"{where}, tensor '{name}'")
            used.add(name)
    if made:
        used |= {n for n in stored if _last(n) == MARK}
    tensors = {n: made.get(n, w) for n, w in stored.items() if n not in used | dropped}
    if not made:
        return tensors, ()
    kinds = sorted({stored[n].dtype for n in made})
    read, written = (sum(w.bytes for w in ws) for ws in ((stored[n] for n in made), made.values()))
    note = (
        f"scaled {' and '.join(kinds)}: {len(made)} weights ({read / 1e6:.1f} MB) are multiplied by "
        f"their scales into the bundle ({written / 1e6:.1f} MB in bfloat16, twice that where it takes "
        "float32)"
    )
    if dropped:
        note += f"; {len(dropped)} scales of activations stay unused: products are not in 8 bits"
    return tensors, (note,)


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _base(name: str) -> str:
    return name.rpartition(".")[0]


def _is_scale_of(scale: Weight, weight: Weight, name: str) -> bool:
    """Ask whether ``weight`` is 8 bits, and ``scale`` one number for it or one for each row of it.

    int8 is taken with a scale for each row alone, which is LightX2V's form.
    """
    rows = weight.shape[:1]
    by_row = scale.shape in (rows, (*rows, *(1,) * (len(weight.shape) - 1))) and bool(rows)
    whole = scale.shape in ((), (1,))
    if scale.dtype not in ("float32", "bfloat16", "float16"):
        return False
    is_int8 = weight.dtype == "int8" and name == "weight_scale" and by_row and not whole
    return is_int8 or (weight.dtype in FLOAT8 and (by_row or whole))


def _multiplied(weight: Weight, scale: Weight) -> Tensor:
    """Return ``weight · scale`` in float32."""
    values = read_weight(weight).to(torch.float32)
    factors = read_weight(scale).to(torch.float32).reshape(-1, *[1] * (values.ndim - 1))
    return values.mul_(factors)


def _check_format(entry: Weight, where: str) -> None:
    """Refuse a weight that says that it is in another format than float8."""
    try:
        told = json.loads(bytes(read_weight(entry).flatten().tolist()))
        kind = told["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            where, "is not JSON with a 'format'", "fetch the file again"
        ) from error
    if kind not in FLOAT8:
        raise CheckpointError(
            where, f"says format '{kind}', and weights with scales are taken in {' and '.join(FLOAT8)}",
            "take the checkpoint in bfloat16, float16 or scaled float8",
        )  # fmt: skip
