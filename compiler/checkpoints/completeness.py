# SPDX-License-Identifier: Apache-2.0
"""Account for all that a checkpoint says: used, known to be unused, or refused by name.

A scale, a codebook or a config key that is left out changes the picture and nothing else shows it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ...core.errors import CheckpointError, nearest
from .sources import Weight

__all__ = [
    "CAST_DTYPES",
    "UNUSED_KEYS",
    "check_keys",
    "check_marks",
    "check_quantization",
    "check_tensors",
]

PLAIN_DTYPES = frozenset({"float32", "bfloat16", "float16"})
CAST_DTYPES: Mapping[str, str] = MappingProxyType(
    {"float8_e4m3fn": "bfloat16", "float8_e5m2": "bfloat16", "float64": "float32"}
)
"""Stored dtype → the one in which graphs take it. bfloat16 holds every float8 value; float8 without
scales is a plain cast, as diffusers takes it."""

QUANTISED: tuple[tuple[str, str], ...] = (
    (r"(^|\.)(scaled_fp8|scale_weight|scale_input|comfy_quant)$", "scaled float8 of ComfyUI"),
    (r"\.(SCB|weight_format)$", "int8 of bitsandbytes"),
    (
        r"\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..*)$",
        "4-bit of bitsandbytes",
    ),
    (r"\.(weight_|_weight_)?(qdata|tensor_impl)(_|$)", "torchao"),
    (r"\.weight\._(data|scale|zeropoint)$|\.(input|output)_scale$", "optimum-quanto or ModelOpt"),
    (
        r"\.(qweight|qzeros|g_idx|wscales|wzeros|smooth(_orig)?|smooth_factor)$",
        "GPTQ, AWQ or SVDQuant",
    ),
    (
        r"\.(weight_|_weight_)?(scale|scale_inv|scale_2|zero_point|scales|zeros|packed)$",
        "weights with scales",
    ),
)
"""Pattern of a tensor's name → kind of quantisation that has it; the first that fits counts."""

UNUSED_TENSORS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "transformer": {},
        "text_encoder": {
            "decoder.": "the text states are the encoder's",
            "lm_head.": "nothing is generated",
        },
        "vae": {
            "encoder.": "the graph decodes only",
            "quant_conv.": "it follows the encoder",
        },
    }
)
"""Part → beginning of a tensor's name → why nothing needs it."""

UNUSED_KEYS: Mapping[str, str] = MappingProxyType(
    {
        "clip_output": "a VAE's frames are clamped to 0 … 1 in any case",
        "dtype": "each tensor says its own",
        "output_past": "of generation, which a text encoder does not do",
        "scalable_attention": "UMT5's attention is never scaled, in transformers' class as in T5X",
        "torch_dtype": "each tensor says its own",
    }
)
"""Config key that diffusers' class does not take → why it changes nothing."""


def check_tensors(
    stored: Mapping[str, Weight],
    wanted: Mapping[str, tuple[int, ...]],
    place: Path,
    *,
    part: str = "transformer",
    cast: bool = True,
    unread: Collection[str] = (),
) -> None:
    """Refuse tensors that the model would not get, or would get and not use.

    Args:
        stored: The part's tensors by the model's own names.
        wanted: Name → shape that the model has.
        place: The part's folder, for messages.
        part: Key of `UNUSED_TENSORS`.
        cast: Whether dtypes of `CAST_DTYPES` are cast on the way.
        unread: Tensors that the model has and its `forward` does not read.

    Raises:
        CheckpointError: the part is quantised, of another layout, incomplete, or has a tensor that
            the model does not.
    """
    known = UNUSED_TENSORS[part]
    odd = [
        n for n in stored if n not in wanted and n not in unread and not n.startswith(tuple(known))
    ]
    check_marks(odd, place)
    plain = PLAIN_DTYPES | (CAST_DTYPES.keys() if cast else set())
    narrow = [n for n in wanted if n in stored and stored[n].dtype not in plain]
    if narrow:
        raise _quantised(
            place, f"tensor '{narrow[0]}'", f"is {stored[narrow[0]].dtype}", len(narrow)
        )
    missing = [n for n in wanted if n not in stored]
    if missing:
        has = f"; it has {len(odd)} of other names, such as '{odd[0]}'" if odd else ""
        raise CheckpointError(
            str(place),
            f"{len(missing)} of {len(wanted)} tensors are missing: {_listed(missing)}{has}",
            "the file is in another layout than diffusers': convert it, or take the checkpoint in "
            "diffusers layout"
            if odd
            else "a shard is missing, or 'config.json' belongs to another model",
        )
    wrong = [n for n, shape in wanted.items() if stored[n].shape != tuple(shape)]
    if wrong:
        name = wrong[0]
        raise CheckpointError(
            f"{place}, tensor '{name}'",
            f"has shape {list(stored[name].shape)}, its config says {list(wanted[name])} "
            f"({len(wanted) - len(wrong)} of {len(wanted)} tensors fit)",
            "'config.json' belongs to another model",
        )
    if odd:
        raise CheckpointError(
            str(place),
            f"has {len(odd)} tensors that the model would not use: {_listed(odd)}",
            "they belong to a variant of the model or to an adapter, and the pictures would lack "
            "them; take the plain checkpoint, and an adapter by --lora",
        )


def check_marks(odd: Collection[str], place: Path) -> None:
    """Refuse names of tensors, of no use to the model, that mark a kind of quantisation.

    Raises:
        CheckpointError: one does.
    """
    for pattern, kind in QUANTISED:
        marks = [n for n in odd if re.search(pattern, n)]
        if marks:
            raise _quantised(place, f"tensor '{marks[0]}'", f"belongs to {kind}", len(marks))


def check_quantization(config: Mapping[str, Any], where: Path) -> None:
    """Refuse a config that says that its weights are quantised.

    Raises:
        CheckpointError: it has a ``quantization_config``.
    """
    found = config.get("quantization_config")
    if not found:
        return
    method = (
        found.get("quant_method", "without 'quant_method'") if isinstance(found, dict) else found
    )
    raise _quantised(where, "'quantization_config'", f"is {method}", 1)


def check_keys(config: Mapping[str, Any], known: Collection[str], where: str) -> None:
    """Refuse config keys that diffusers would drop.

    Args:
        config: A part's ``config.json``; keys that begin with ``_`` tell its origin.
        known: Arguments of the part's class.
        where: What to call the file.

    Raises:
        CheckpointError: names every such key.
    """
    odd = [n for n in config if not n.startswith("_") and n not in known and n not in UNUSED_KEYS]
    if odd:
        raise CheckpointError(
            where,
            f"has keys that change the model and are not understood: {_listed(odd)}",
            f"take a checkpoint of the plain class, or remove the key ({nearest(odd[0], list(known))})",
        )


def _quantised(place: Path, name: str, found: str, count: int) -> CheckpointError:
    more = f", and so {'does' if count == 2 else 'do'} {count - 1} more" if count > 1 else ""
    return CheckpointError(
        f"{place}, {name}",
        f"{found}{more}: the checkpoint is quantised, and its weights mean nothing without what "
        "undoes that",
        "take the checkpoint in bfloat16, float16 or float32, or load it with its own library, "
        "dequantize, and save_pretrained(folder, safe_serialization=True)",
    )


def _listed(names: list[str]) -> str:
    shown = ", ".join(f"'{n}'" for n in names[:5])
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")
