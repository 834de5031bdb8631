# SPDX-License-Identifier: Apache-2.0
"""Join scales with the 8-bit weights that they belong to, and say which of these stay in 8 bits.

A scaled weight is ``stored · scale``, the scale one number or one of each output row, as ComfyUI,
LightX2V and ModelOpt write them. Forms that mean anything else (blocks, zero points, two levels of
scales) are left as they are, for `check_tensors` to refuse by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from functools import partial
from math import prod
from pathlib import Path

import torch

from ...bundle.safetensors_header import StoredTensor
from ...bundle.scales import KEPT, scale_name
from ...core.errors import CheckpointError
from .sources import MadeTensor, ScaledTensor, Weight, part_of, read_weight

__all__ = ["keep_float8", "tell_of_scales", "without_scales"]

FLOAT8 = ("float8_e4m3fn", "float8_e5m2")
SCALES = ("scale_weight", "weight_scale")
"""Name of a scale beside its ``weight``: ComfyUI's first form; LightX2V's, ModelOpt's and ComfyUI's."""

OF_ACTIVATIONS = ("scale_input", "input_scale")
"""Name of what a kernel divides activations by before it rounds them to 8 bits, which none here does."""

MARK = "scaled_fp8"
FORMAT = "comfy_quant"
"""Name of JSON, as bytes beside a ``weight``, that says in which format it is."""


def without_scales(
    stored: Mapping[str, StoredTensor], where: Path
) -> tuple[dict[str, Weight], tuple[str, ...]]:
    """Return the tensors with each scale joined to its weight, and notes for people.

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
            made[f"{base}.weight"] = ScaledTensor(weight, stored[name])
            used.add(name)
    dropped = {n for n in stored if _last(n) in OF_ACTIVATIONS and _base(n) + ".weight" in made}
    for name in stored:
        if _last(name) == FORMAT and _base(name) + ".weight" in made:
            _check_format(stored[name], f"{where}, tensor '{name}'")
            used.add(name)
    if made:
        used |= {n for n in stored if _last(n) == MARK}
    tensors = {n: made.get(n, w) for n, w in stored.items() if n not in used | dropped}
    note = f"{len(dropped)} scales of activations stay unused: products are not in 8 bits"
    return tensors, (note,) if dropped else ()


def keep_float8(tensors: Mapping[str, Weight], second: str) -> dict[str, Weight]:
    """Return a model's tensors with float8_e4m3fn as it lies, and the scale of each row beside it.

    Blocks share one graph, and so do experts: a weight stays in float8 where it is in all of them.
    Without a scale of its own, its scale is 1.

    Args:
        tensors: By the model's own names.
        second: What begins the names of the second expert's.
    """

    def of_all(name: str) -> str:
        return re.sub(r"\d+", "#", name.removeprefix(second))

    wider = {of_all(n) for n, w in tensors.items() if _values(w) is None}
    kept: dict[str, Weight] = {}
    for name, weight in tensors.items():
        values = _values(weight)
        if values is None or of_all(name) in wider:
            kept[name] = weight
        else:
            kept[name], kept[scale_name(name)] = values, _scale_of_rows(weight)
    return kept


def _values(weight: Weight) -> StoredTensor | None:
    """Return a weight as it lies, if that is in float8_e4m3fn."""
    values = weight.values if isinstance(weight, ScaledTensor) else weight
    return values if isinstance(values, StoredTensor) and values.dtype == KEPT else None


def _scale_of_rows(weight: Weight) -> Weight:
    """Return the scale of each row: where it lies, or made of one number."""
    shape = (*weight.shape[:1], *[1] * (len(weight.shape) - 1))
    if not isinstance(weight, ScaledTensor):
        return MadeTensor("float32", shape, "no scale", partial(torch.ones, shape))
    scale = weight.scale
    if prod(scale.shape) == prod(shape):
        return part_of(scale, shape, 0)
    return MadeTensor("float32", shape, "one scale", lambda: read_weight(scale).expand(shape))


def tell_of_scales(tensors: Mapping[str, Weight]) -> tuple[str, ...]:
    """Say what comes of weights in 8 bits, for people."""
    notes = []
    kept = [w for n, w in tensors.items() if scale_name(n) in tensors]
    made = [w for w in tensors.values() if isinstance(w, ScaledTensor)]
    if kept:
        notes.append(
            f"{KEPT}: {len(kept)} weights ({_megabytes(kept)} MB) stay as they lie, and graphs "
            "multiply them by their scales"
        )
    if made:
        kinds = sorted({w.values.dtype for w in made})
        notes.append(
            f"scaled {' and '.join(kinds)}: {len(made)} weights "
            f"({_megabytes(w.values for w in made)} MB) are multiplied by their scales into the "
            f"bundle ({_megabytes(made)} MB in bfloat16, twice that where it takes float32)"
        )
    return tuple(notes)


def _megabytes(weights: Iterable[Weight]) -> str:
    return f"{sum(w.bytes for w in weights) / 1e6:.1f}"


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _base(name: str) -> str:
    return name.rpartition(".")[0]


def _is_scale_of(scale: StoredTensor, weight: StoredTensor, name: str) -> bool:
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
            where,
            f"says format '{kind}', and weights with scales are taken in {' and '.join(FLOAT8)}",
            "take the checkpoint in bfloat16, float16 or scaled float8",
        )
