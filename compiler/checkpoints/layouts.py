# SPDX-License-Identifier: Apache-2.0
"""Say what a folder or file holds that a build does not take, and how to get what it takes from it."""

from __future__ import annotations

import re
from pathlib import Path

from ...core.errors import CheckpointError

__all__ = ["file_fault", "folder_fault", "weights_fault"]

PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
TO_SAFETENSORS = (
    "convert them: load with diffusers and call save_pretrained(folder, safe_serialization=True); a "
    "single file's tensors alone by python -c \"import torch, safetensors.torch as s; "
    "s.save_file(torch.load('{0}', weights_only=True), '{0}.safetensors')\""
)
PICKLED = "pickled weights, which Freewheel never opens"


def file_fault(file: Path) -> CheckpointError:
    """Say what a file is that was given in place of a folder."""
    suffix = file.suffix.lower()
    if suffix in PICKLES:
        return CheckpointError(str(file), f"is a file of {PICKLED}", TO_SAFETENSORS.format(file))
    return CheckpointError(
        str(file),
        "is a file of no kind that holds weights",
        "give a .safetensors or .gguf file, the folder with 'model_index.json', or the one with the "
        "transformer's 'config.json'",
    )


def folder_fault(folder: Path) -> CheckpointError:
    """Say what a folder holds that has neither ``model_index.json`` nor ``config.json``."""
    if (folder / "transformer" / "config.json").is_file():
        return CheckpointError(
            str(folder),
            "has a folder 'transformer' and no 'model_index.json'",
            f"fetch 'model_index.json' too, or give '{folder / 'transformer'}'",
        )
    high, low = (folder / f"{level}_noise_model" for level in ("high", "low"))
    if high.is_dir() and low.is_dir():
        return CheckpointError(
            str(folder),
            f"holds two transformers, '{high.name}' and '{low.name}'",
            f"give '{high}' as MODEL, --low-noise-model '{low}', and --pipeline with the same model "
            "in diffusers layout (its transformers' weights may lack)",
        )
    found = _found(folder)
    if found is not None:
        return CheckpointError(str(folder), *found)
    return CheckpointError(
        str(folder),
        f"has neither 'model_index.json' nor 'config.json'; {_listing(folder)}",
        "give a checkpoint in diffusers layout",
    )


def weights_fault(folder: Path, stem: str, variant: str | None = None) -> CheckpointError:
    """Say which weights a part's folder has instead of those wanted, whole or an index of shards."""
    single = f"{stem}.safetensors"
    names = sorted(p.name for p in folder.glob("*.safetensors"))
    numbered = [n for n in names if re.fullmatch(rf"{re.escape(stem)}-\d+-of-\d+\.safetensors", n)]
    if numbered and variant is None:
        return CheckpointError(
            str(folder),
            f"has {len(numbered)} shards, such as '{numbered[0]}', and no index of them",
            f"fetch '{single}.index.json' from where the shards come from",
        )
    number = r"(?:-\d+-of-\d+)?"
    of_variant = re.compile(rf"{re.escape(stem)}{number}\.([\w]+?){number}\.safetensors")
    variants = {n: m[1] for n in names if (m := of_variant.fullmatch(n))}
    there = sorted(set(variants.values()) - {variant})
    if variant in variants.values() and not there:
        return CheckpointError(
            str(folder),
            f"has shards of variant '{variant}', and no index of them",
            f"fetch '{single}.index.{variant}.json' from where the shards come from",
        )
    if there:
        name = next(n for n, v in variants.items() if v == there[0])
        only = "only" if variant is None else f"and not as '{variant}'"
        return CheckpointError(
            str(folder),
            f"has the weights as variant '{there[0]}' {only}, in '{name}'",
            f"give --variant {there[0]}",
        )
    if variant is not None:
        return CheckpointError(
            str(folder),
            f"has no weights of variant '{variant}'",
            "leave --variant out" if (folder / single).is_file() else "fetch them",
        )
    found = _found(folder)
    if found is not None:
        return CheckpointError(str(folder), *found)
    return CheckpointError(
        str(folder), f"has no '{single}' and no index of shards", "fetch the weights"
    )


def _found(folder: Path) -> tuple[str, str] | None:
    """Say what weights of other layouts a folder holds, and what to do about them."""
    files = sorted(p for p in folder.iterdir() if p.is_file())
    by_suffix = {
        s: [f.name for f in files if f.suffix.lower() == s] for s in {f.suffix for f in files}
    }
    single = by_suffix.get(".safetensors", []) or by_suffix.get(".gguf", [])
    if single:
        return (
            f"has '{single[0]}', which is not named as diffusers names weights",
            f"give the file itself: '{folder / single[0]}'",
        )
    pickled = [name for suffix in sorted(PICKLES) for name in by_suffix.get(suffix, [])]
    if pickled:
        return f"holds {PICKLED}", TO_SAFETENSORS.format(folder / pickled[0])
    return None


def _listing(folder: Path) -> str:
    names = sorted(p.name for p in folder.iterdir())
    shown = ", ".join(f"'{n}'" for n in names[:5])
    return f"it holds {shown}" if names else "it is empty"
