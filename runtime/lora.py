# SPDX-License-Identifier: Apache-2.0
"""Add LoRAs to a bundle's weights when it is loaded: other tensors, not another build."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..bundle.reader import Bundle
from ..configs.errors import RequestError

__all__ = ["Lora", "lora_from_state_dict", "merge_loras", "read_lora"]

PREFIX = "transformer."


@dataclass(frozen=True)
class Lora:
    """Low-rank updates of some weights.

    Attributes:
        name: Where it came from, for messages.
        scale: Factor of the whole update.
        pairs: Module name → (down [rank, in], up [out, rank], alpha / rank).
        biases: Module name → update of its bias, where the file has one.
    """

    name: str
    scale: float
    pairs: Mapping[str, tuple[Tensor, Tensor, float]]
    biases: Mapping[str, Tensor]


def read_lora(text: str) -> Lora:
    """Read ``FILE[:scale]``; every format that diffusers' Wan loader converts is understood.

    Raises:
        RequestError: no such file, not safetensors, or no LoRA weights in it.
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
    from diffusers.loaders.lora_pipeline import WanLoraLoaderMixin

    try:
        state = WanLoraLoaderMixin.lora_state_dict(path, use_safetensors=True)
    except (ValueError, KeyError, OSError, SafetensorError) as error:
        raise RequestError(
            f"--lora '{path}'", f"can't be read: {error}", "give a LoRA of this model"
        ) from error
    return lora_from_state_dict(path, state, factor)


def lora_from_state_dict(name: str, state: Mapping[str, Tensor], scale: float = 1.0) -> Lora:
    """Collect the pairs of a LoRA in diffusers' (PEFT) naming.

    Raises:
        RequestError: no pair, or half of one.
    """
    state = {k.removeprefix(PREFIX): v for k, v in state.items()}
    modules = sorted({k.rpartition(".lora_")[0] for k in state if ".lora_" in k})
    pairs, biases = {}, {}
    for module in modules:
        down, up = (state.get(f"{module}.lora_{side}.weight") for side in "AB")
        if down is None or up is None:
            raise RequestError(
                f"LoRA '{name}', module '{module}'", "has one half of a pair", "use a whole file"
            )
        alpha = float(state.get(f"{module}.alpha", torch.tensor(float(down.shape[0]))))
        pairs[module] = (down, up, alpha / down.shape[0])
        bias = state.get(f"{module}.lora_B.bias")
        if bias is not None:
            biases[module] = bias
    if not pairs:
        raise RequestError(
            f"LoRA '{name}'",
            "holds no '…lora_A.weight' / '…lora_B.weight' pair",
            "give a LoRA of this model",
        )
    return Lora(name, scale, pairs, biases)


def merge_loras(bundle: Bundle, loras: Sequence[Lora], prefix: str = "") -> dict[str, Tensor]:
    """Return private copies of the weights that ``loras`` change, updated in float32.

    Args:
        bundle: Holds the weights.
        loras: Added in order.
        prefix: What precedes the names of the expert that they are for.

    Raises:
        RequestError: a LoRA names a module that the model lacks, or has other sizes; or the
            bundle's weights are baked into its engines.
    """
    if loras and bundle.manifest.weights == "baked":
        raise RequestError(
            f"LoRA '{loras[0].name}'", "can't be added: this bundle's weights are inside its engines",
            "build the bundle with --weights inputs",
        )  # fmt: skip
    known = bundle.manifest.tensors
    merged: dict[str, Tensor] = {}
    for lora in loras:
        missing = [m for m in lora.pairs if f"{prefix}{m}.weight" not in known]
        if missing:
            raise RequestError(
                f"LoRA '{lora.name}'",
                f"{len(missing)} of {len(lora.pairs)} modules are not in the model, such as '{missing[0]}'",
                "give a LoRA of this model",
            )
        for module, (down, up, ratio) in lora.pairs.items():
            name = f"{prefix}{module}.weight"
            weight = merged.get(name, bundle.tensor(name))
            rows, columns = weight.flatten(1).shape
            if up.shape[0] != rows or down.flatten(1).shape[1] != columns:
                raise RequestError(
                    f"LoRA '{lora.name}', module '{module}'",
                    f"updates [{up.shape[0]}, {down.flatten(1).shape[1]}], the weight is [{rows}, {columns}]",
                    "give a LoRA of this model",
                )
            update = (up.flatten(1).float() @ down.flatten(1).float()).reshape(weight.shape)
            merged[name] = (weight.float() + lora.scale * ratio * update).to(weight.dtype)
        for module, bias in lora.biases.items():
            name = f"{prefix}{module}.bias"
            merged[name] = (
                merged.get(name, bundle.tensor(name)).float() + lora.scale * bias.float()
            ).to(bundle.tensor(name).dtype)
    return merged
