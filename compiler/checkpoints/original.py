# SPDX-License-Identifier: Apache-2.0
"""Read a transformer in its authors' layout: diffusers' own single-file converters name its tensors.

The names come from the converters alone (`diffusers.loaders.single_file_model`); no tensor is read
for them, and what is a contiguous part of a stored tensor, as q, k and v are of a fused one, stays
where it lies.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from diffusers.loaders.single_file_utils import infer_diffusers_model_type

from ...core.errors import CheckpointError
from .completeness import check_marks
from .conversion import convert
from .geometry import class_by_names, config_from_shapes
from .kinds import refuse_other_kinds
from .sources import MadeTensor, Weight

__all__ = ["ORIGINAL_CONFIGS", "original_transformer"]

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.model.")
"""What ComfyUI and trainers put before a transformer's names."""

OTHER_PARTS: Mapping[str, str] = MappingProxyType(
    {
        "vae.": "VAE",
        "first_stage_model.": "VAE",
        "text_encoders.": "text encoders",
        "cond_stage_model.": "text encoder",
        "conditioner.": "text encoders",
    }
)
"""Beginning of a name in a file of several parts → the part, which a build takes from a pipeline."""

DETECTED: tuple[tuple[str, str], ...] = (
    ("wan-t2v-", "WanTransformer3DModel"),
    ("wan-i2v-", "WanTransformer3DModel"),
    ("flux-dev", "FluxTransformer2DModel"),
    ("flux-schnell", "FluxTransformer2DModel"),
    ("flux-fill", "FluxTransformer2DModel"),
    ("flux-depth", "FluxTransformer2DModel"),
    ("hunyuan-video", "HunyuanVideoTransformer3DModel"),
    ("ltx-video", "LTXVideoTransformer3DModel"),
    ("sd3", "SD3Transformer2DModel"),
    ("z-image-turbo", "ZImageTransformer2DModel"),
)
"""Beginning of what diffusers' detection answers → class of a family."""

UNUSED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"ZImageTransformer2DModel": ("norm_final.weight",)}
)
"""Class → tensors of its authors' files that their own model makes no use of."""

UNDETECTED = "v1"
"""What diffusers' detection answers where it recognises nothing."""

ORIGINAL_CONFIGS: Mapping[str, tuple[str, Mapping[str, str]]] = MappingProxyType(
    {
        "WanModel": (
            "WanTransformer3DModel",
            {
                "eps": "eps",
                "ffn_dim": "ffn_dim",
                "freq_dim": "freq_dim",
                "in_dim": "in_channels",
                "num_heads": "num_attention_heads",
                "num_layers": "num_layers",
                "out_dim": "out_channels",
            },
        )
    }
)
"""``_class_name`` of an authors' config → diffusers class, and its keys → diffusers'."""

WITHOUT_EFFECT = ("dim", "model_type", "text_len")
"""Keys of an authors' config that tensors tell, or that no graph depends on."""


def original_transformer(
    stored: Mapping[str, Weight], where: Path, config: Mapping[str, Any] | None
) -> tuple[dict[str, Weight], dict[str, Any], tuple[str, ...]]:
    """Return a transformer's tensors by diffusers' names, its config, and notes for people.

    Args:
        stored: Every tensor of the file or shards, by the names that these have.
        where: The file or folder.
        config: What a file says of the model: diffusers' config, its authors', or None.

    Raises:
        CheckpointError: no transformer that diffusers converts, tensors that its converter leaves
            aside, or a config that the shapes deny.
    """
    own, notes = _without_prefix(stored, where)
    authors = config if config and config.get("_class_name") in ORIGINAL_CONFIGS else None
    told = None if config is None else str(config.get("_class_name"))
    name = ORIGINAL_CONFIGS[str(told)][0] if authors else told
    by_names = class_by_names(own)
    if by_names is None:
        refuse_other_kinds(own or stored, where)
    name = name or by_names or _detected(own, where)
    if by_names is None and name in SINGLE_FILE_LOADABLE_CLASSES:
        tensors = _converted(name, own, where)
        notes += _told(own, tensors)
    else:
        tensors = own
    if config is None or authors is not None:
        shapes = {n: w.shape for n, w in tensors.items()}
        heads = authors.get("num_heads") if authors else None
        found = config_from_shapes(name, shapes, str(where), heads=heads)
        if authors is not None:
            _agree(authors, found, where)
            found |= {"eps": authors.get("eps", found.get("eps"))}
        else:
            notes += (
                f"no config.json: {name}'s geometry is told by shapes, and the rest is that of the "
                "published models",
            )
        config = found
    return tensors, dict(config), notes


def _without_prefix(
    stored: Mapping[str, Weight], where: Path
) -> tuple[dict[str, Weight], tuple[str, ...]]:
    """Return the transformer's own tensors without what stands before their names."""
    prefix = next((p for p in PREFIXES if any(n.startswith(p) for n in stored)), "")
    rest = [n for n in stored if not n.startswith(prefix)] if prefix else []
    rest += [n for n in stored if not prefix and n.startswith(tuple(OTHER_PARTS))]
    odd = [n for n in rest if not n.startswith(tuple(OTHER_PARTS))]
    if odd:
        raise CheckpointError(
            str(where),
            f"has {len(odd)} tensors beside '{prefix}…' of no known part, such as '{odd[0]}'",
            "take the file of the plain transformer, or its checkpoint in diffusers layout",
        )
    aside = set(rest)
    parts = sorted(
        {part for begin, part in OTHER_PARTS.items() for n in rest if n.startswith(begin)}
    )
    notes = (f"{' and '.join(parts)} of the file stay unused: a build takes them by --pipeline",)
    own = {n.removeprefix(prefix): w for n, w in stored.items() if n not in aside}
    return own, notes if parts else ()


def _detected(own: Mapping[str, Weight], where: Path) -> str:
    """Return the class that diffusers' detection finds."""
    try:
        kind = infer_diffusers_model_type(own)
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(
            str(where),
            f"can't be told what model it is: diffusers' detection misses {error}",
            "lay the transformer's 'config.json' beside it, or give --pipeline",
        ) from error
    for begin, name in DETECTED:
        if kind.startswith(begin):
            return name
    if kind == UNDETECTED:
        _check_quantised(own, where)
        shown = ", ".join(f"'{n}'" for n in list(own)[:3])
        raise CheckpointError(
            str(where),
            f"holds no transformer that diffusers recognises; its tensors are {shown}, …",
            "lay the transformer's 'config.json' beside it, or give --pipeline",
        )
    raise CheckpointError(
        str(where),
        f"is '{kind}' to diffusers, which has no family here",
        "families: docs/reference/families.md; a Wan, FLUX.1, HunyuanVideo, LTX-Video, Qwen-Image, "
        "Stable Diffusion 3 or Z-Image file is taken",
    )


def _converted(name: str, own: Mapping[str, Weight], where: Path) -> dict[str, Weight]:
    """Rename by the class's converter; refuse tensors that it leaves aside."""
    row: Any = SINGLE_FILE_LOADABLE_CLASSES[name]
    converter = row["checkpoint_mapping_fn"]
    try:
        tensors, aside = convert(own, lambda state: converter(checkpoint=state, config=None))
    except Exception as error:  # of diffusers' making: KeyError, RuntimeError, …
        _check_quantised(own, where)
        raise CheckpointError(
            str(where),
            f"diffusers' converter of '{name}' stops at it: {type(error).__name__} {error}",
            "it is another model or another layout: take its checkpoint in diffusers layout",
        ) from error
    aside = [n for n in aside if n not in UNUSED.get(name, ())]
    check_marks(aside, where)
    if aside:
        raise CheckpointError(
            str(where),
            f"has {len(aside)} tensors that diffusers' converter of '{name}' leaves aside, "
            f"such as '{aside[0]}'",
            "they belong to a variant of the model or to an adapter, and the pictures would lack "
            "them; take the plain checkpoint, and an adapter by --lora",
        )
    return tensors


def _check_quantised(own: Mapping[str, Weight], where: Path) -> None:
    """Name a quantisation where the names of a file's tensors tell one."""
    check_marks([n for n in own if not n.endswith("norm.scale")], where)  # FLUX.1's norms


def _told(own: Mapping[str, Weight], tensors: Mapping[str, Weight]) -> tuple[str, ...]:
    """Say what the conversion came to."""
    made = {n: w for n, w in tensors.items() if isinstance(w, MadeTensor)}
    lying = len(tensors) - len(made)
    fused = [n for n, w in made.items() if not any(w is o for o in own.values())]
    text = f"original layout: {lying} of {len(tensors)} tensors are read where they lie"
    if fused:
        size = sum(tensors[n].bytes for n in fused) / 1e6
        text += f"; {len(fused)} are made of others ({size:.1f} MB), such as '{fused[0]}'"
    return (text,)


def _agree(authors: Mapping[str, Any], found: Mapping[str, Any], where: Path) -> None:
    """Hold an authors' config to what shapes say."""
    _, keys = ORIGINAL_CONFIGS[str(authors["_class_name"])]
    known = {*keys, *WITHOUT_EFFECT}
    odd = [k for k in authors if not k.startswith("_") and k not in known]
    wrong = {k: v for k, v in authors.items() if k in keys and k != "eps" and found[keys[k]] != v}
    if odd or wrong:
        name, value = next(iter(wrong.items()), (odd[0] if odd else "", None))
        what = (
            f"is {value}, and the tensors say {found[keys[name]]}"
            if wrong
            else "is not understood, and may change the model"
        )
        raise CheckpointError(
            f"{where}, config key '{name}'", what, "take the config of these weights"
        )
