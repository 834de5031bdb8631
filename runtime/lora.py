# SPDX-License-Identifier: Apache-2.0
"""LoRA files: checked here, converted and loaded by the pipeline's own loader of diffusers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..core.errors import RequestError
from .low_rank import FACTORS, plain_lora

__all__ = ["LoraFile", "load_lora", "parse_lora"]

SUFFIXES = (
    ".lora_A.weight", ".lora_B.weight", ".lora_A.default.weight", ".lora_B.default.weight",
    ".lora_down.weight", ".lora_up.weight", ".down.weight", ".up.weight",
    ".lora_B.bias", ".lora_magnitude_vector", ".lora_magnitude_vector.weight", ".alpha", ".diff_b",
    *(f".{factor}" for factor in FACTORS),
)  # fmt: skip
"""How the tensors of a LoRA are called that diffusers' loaders know, or `plain_lora`."""

FORMS = {"hada_", "lokr_"}
KNOW_LOKR = ("Flux2", "ZImage")
"""Pipelines whose loaders of diffusers take LoKr, in layouts of their own."""

LAYOUTS = {
    ".hada_t": "LoHa of a convolution",
    ".lokr_t": "LoKr of a convolution",
    ".oft_": "OFT",
    ".dora_scale": "kohya's DoRA",
    ".diff": "a full difference of weights",
}
"""What is in the name of a tensor → layouts that diffusers' loaders leave out or refuse."""


@dataclass(frozen=True)
class LoraFile:
    """A LoRA as a user names it.

    Attributes:
        path: A safetensors file.
        scale: Factor of the whole update.
    """

    path: str
    scale: float


def parse_lora(text: str) -> LoraFile:
    """Read ``FILE[:scale]`` and look through the file's header.

    Raises:
        RequestError: no such file, not safetensors, or a layout that can't be applied.
    """
    path, separator, scale = text.rpartition(":")
    if not separator or Path(text).exists():
        path, scale = text, "1"
    try:
        factor = float(scale)
    except ValueError as error:
        raise RequestError(
            f"--lora '{text}'", f"scale '{scale}' is not a number", "write FILE:0.8"
        ) from error
    if not Path(path).is_file():
        raise RequestError(f"--lora '{path}'", "is not a file", "give a .safetensors file")
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                _check_tensor(path, name, file)
    except (OSError, SafetensorError) as error:
        raise RequestError(
            f"--lora '{path}'", f"can't be read: {error}", "give a LoRA of this model"
        ) from error
    return LoraFile(path, factor)


def _check_tensor(path: str, name: str, file: Any) -> None:
    """Raise `RequestError` at a tensor that diffusers' loaders would leave out."""
    if "norm" in name and name.endswith((".diff", ".diff_b")):
        if not bool(file.get_tensor(name).any()):
            return  # zeros, as extraction tools write them
    elif name.endswith(SUFFIXES):
        return
    layout = next((text for mark, text in LAYOUTS.items() if mark in name), "no LoRA tensor")
    module = name.rpartition(".")[0]
    raise RequestError(
        f"--lora '{path}', module '{module}'", f"'{name}' is {layout}, which can't be applied",
        "merge it into the checkpoint and build that, or give a plain LoRA",
    )  # fmt: skip


def _source(pipe: Any, path: str) -> Any:
    """Return the file, or its tensors as plain LoRA where it has others that the loader doesn't know."""
    with safe_open(path, framework="pt") as file:
        forms = {name.rpartition(".")[2][:5] for name in file.keys()} & FORMS  # noqa: SIM118
        if not forms or (forms == {"lokr_"} and type(pipe).__name__.startswith(KNOW_LOKR)):
            return path
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return plain_lora(state, f"--lora '{path}'")


def load_lora(pipe: Any, lora: LoraFile, adapter_name: str) -> None:
    """Load a file through the pipeline's own loader, which knows the family's layouts.

    Raises:
        RequestError: the loader refuses the file, or part of it is not the transformer's.
    """
    place = f"--lora '{lora.path}'"
    if not hasattr(pipe, "load_lora_weights"):
        raise RequestError(
            place, f"can't be loaded: {type(pipe).__name__} has no loader of LoRAs",
            "merge it into the checkpoint and build that",
        )  # fmt: skip
    try:
        source = _source(pipe, lora.path)
        state = pipe.lora_state_dict(source if isinstance(source, str) else dict(source))
        state = state[0] if isinstance(state, tuple) else state
        others = sorted(n for n in state if n.startswith("text_encoder"))
        if others:
            raise RequestError(
                f"{place}, module '{others[0].rpartition('.lora')[0]}'",
                "belongs to the text encoder, which attach leaves alone",
                "call pipe.load_lora_weights(FILE) after attach",
            )  # fmt: skip
        pipe.load_lora_weights(source, adapter_name=adapter_name)
    except KeyError as error:
        raise RequestError(
            f"{place}, tensor {error}", "is missing: diffusers converts this layout only whole",
            "give the file in diffusers' layout",
        ) from error  # fmt: skip
    except (ValueError, OSError, RuntimeError, SafetensorError) as error:
        raise RequestError(
            place, f"can't be applied: {error}", "give a LoRA of this model"
        ) from error
