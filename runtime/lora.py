# SPDX-License-Identifier: Apache-2.0
"""LoRA files: checked here, converted and loaded by the pipeline's own loader of diffusers."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..core.errors import RequestError
from .low_rank import FACTORS, plain_lora

__all__ = ["DIFFERENCE", "FIRST", "LoraFile", "check_parts", "load_lora", "parse_lora"]

DIFFERENCE = ".difference"
"""After a parameter's whole name, in files that `freewheel lora` writes."""

DIFFERENCES = {".diff": ".weight", ".diff_b": ".bias", ".diff_m": ".modulation", DIFFERENCE: ""}
"""After a module's name, of what is added to a parameter as it stands → that parameter's part of the name."""

SUFFIXES = (
    ".lora_A.weight", ".lora_B.weight", ".lora_A.default.weight", ".lora_B.default.weight",
    ".lora_down.weight", ".lora_up.weight", ".down.weight", ".up.weight",
    ".lora_B.bias", ".lora_magnitude_vector", ".lora_magnitude_vector.weight", ".alpha",
    *(f".{factor}" for factor in FACTORS), *DIFFERENCES,
)  # fmt: skip
"""How the tensors of a LoRA are called that diffusers' loaders know, `plain_lora` or `load_lora`."""

PREFIXES = ("transformer.", "model.diffusion_model.", "diffusion_model.")
"""What may precede the names of a model's parameters."""

FORMS = {"hada_", "lokr_"}
NO_TARGETS = "model_type"
"""What PEFT looks for where an adapter's config names no modules: a text model's own."""

KNOW_LOKR = ("Flux2", "ZImage")
"""Pipelines whose loaders of diffusers take LoKr, in layouts of their own."""

LAYOUTS = {
    ".hada_t": "LoHa of a convolution",
    ".lokr_t": "LoKr of a convolution",
    ".oft_": "OFT",
    ".dora_scale": "kohya's DoRA",
}
"""What is in the name of a tensor → layouts that diffusers' loaders leave out or refuse."""


FIRST, SECOND = "transformer", "transformer_2"
"""Experts, by their names in a diffusers pipeline."""


@dataclass(frozen=True)
class LoraFile:
    """A LoRA as a user names it.

    Attributes:
        path: A safetensors file.
        scale: Factor of the whole update.
        part: Of the pipeline, whose weights it changes: ``transformer``, or the second expert.
    """

    path: str
    scale: float
    part: str = FIRST


def parse_lora(text: str) -> LoraFile:
    """Read ``[PART=]FILE[:scale]`` and look through the file's header.

    Raises:
        RequestError: no such file, not safetensors, or a layout that can't be applied.
    """
    part, named, rest = text.partition("=")
    if not named or part not in (FIRST, SECOND) or Path(text).exists():
        part, rest = FIRST, text
    path, separator, scale = rest.rpartition(":")
    if not separator or Path(rest).exists():
        path, scale = rest, "1"
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
                _check_tensor(path, name)
    except (OSError, SafetensorError) as error:
        raise RequestError(
            f"--lora '{path}'", f"can't be read: {error}", "give a LoRA of this model"
        ) from error
    return LoraFile(path, factor, part)


def check_parts(files: Iterable[LoraFile], parts: Collection[str]) -> None:
    """Raise `RequestError` at a LoRA of an expert that is not among a bundle's."""
    for file in files:
        if file.part not in parts:
            raise RequestError(
                f"--lora '{file.part}={file.path}'",
                f"is of '{file.part}', and the bundle has {', '.join(parts)} alone",
                "leave the part out",
            )


def _check_tensor(path: str, name: str) -> None:
    """Raise `RequestError` at a tensor that would be left out."""
    if name.endswith(SUFFIXES):
        return
    layout = next((text for mark, text in LAYOUTS.items() if mark in name), "no LoRA tensor")
    module = name.rpartition(".")[0]
    raise RequestError(
        f"--lora '{path}', module '{module}'",
        f"'{name}' is {layout}, which can't be applied",
        "merge it into the checkpoint and build that, or give a plain LoRA",
    )


def _read(pipe: Any, path: str) -> tuple[str | dict[str, Tensor], dict[str, Tensor]]:
    """Return what diffusers' loader takes, and the differences, by parameter as the file names it.

    The first is the file, or its tensors as plain LoRA where it has others that the loader doesn't know.
    """
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        ends = {name: next((e for e in DIFFERENCES if name.endswith(e)), None) for name in names}
        differences = {
            name.removesuffix(end) + DIFFERENCES[end]: file.get_tensor(name)
            for name, end in ends.items()
            if end is not None
        }
        forms = {name.rpartition(".")[2][:5] for name in names} & FORMS
        is_known = not forms or (forms == {"lokr_"} and type(pipe).__name__.startswith(KNOW_LOKR))
        if is_known and not differences:
            return path, {}
        state = {name: file.get_tensor(name) for name, end in ends.items() if end is None}
    if not is_known:
        state = plain_lora(state, f"--lora '{path}'")
    # Extraction tools write zeros for what did not change.
    return state, {name: tensor for name, tensor in differences.items() if bool(tensor.any())}


def _by_parameter(model: Any, differences: Mapping[str, Tensor], place: str) -> dict[str, Tensor]:
    """Return differences by the model's own names of parameters; a file may have its authors' names.

    Raises:
        RequestError: one is of no parameter of the model, or of another shape.
    """
    found = dict(differences)
    for prefix in PREFIXES:
        found = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
    shapes = {n.replace(".base_layer", ""): p.shape for n, p in model.named_parameters()}
    row: Any = SINGLE_FILE_LOADABLE_CLASSES.get(type(model).__name__)
    if row is not None and not found.keys() <= shapes.keys():
        # Some converters take whole checkpoints alone.
        with suppress(AttributeError, LookupError, RuntimeError, TypeError, ValueError):
            found = row["checkpoint_mapping_fn"](dict(found))
    for name, tensor in found.items():
        if tensor.shape != shapes.get(name):
            raise RequestError(
                f"{place}, parameter '{name}'",
                f"is changed by a difference of shape {list(tensor.shape)}, but the model "
                + (
                    f"has it as {list(shapes[name])}" if name in shapes else "has no such parameter"
                ),
                "give a LoRA of this model",
            )
    return found


def load_lora(pipe: Any, lora: LoraFile, adapter_name: str, model: Any) -> dict[str, Tensor]:
    """Load a file through the pipeline's own loader, which knows the family's layouts.

    Args:
        pipe: Whose loader it is.
        lora: What is loaded; its scale counts nothing here.
        adapter_name: By which the pipeline knows it.
        model: The transformer that it is for.

    Returns:
        What the file adds to parameters as it stands, by their names; no adapter holds it.

    Raises:
        RequestError: the loader refuses the file, or part of it is not the transformer's.
    """
    place = f"--lora '{lora.path}'"
    if not hasattr(pipe, "load_lora_weights"):
        raise RequestError(
            place,
            f"can't be loaded: {type(pipe).__name__} has no loader of LoRAs",
            "merge it into the checkpoint and build that",
        )
    try:
        source, differences = _read(pipe, lora.path)
        differences = _by_parameter(model, differences, place)
        if not source:
            return differences
        state = pipe.lora_state_dict(source if isinstance(source, str) else dict(source))
        state = state[0] if isinstance(state, tuple) else state
        others = sorted(n for n in state if n.startswith("text_encoder"))
        if others:
            raise RequestError(
                f"{place}, module '{others[0].rpartition('.lora')[0]}'",
                "belongs to the text encoder, which attach leaves alone",
                "call pipe.load_lora_weights(FILE) after attach",
            )
        expert = {"load_into_transformer_2": True} if lora.part == SECOND else {}
        pipe.load_lora_weights(source, adapter_name=adapter_name, **expert)
    except KeyError as error:
        if error.args == (NO_TARGETS,):
            raise RequestError(
                f"{place}, header 'lora_adapter_metadata'",
                "names no 'target_modules', without which PEFT can't place the adapter",
                "write the file with pipe.save_lora_weights, whose header is whole",
            ) from error
        raise RequestError(
            f"{place}, tensor {error}",
            "is missing: diffusers converts this layout only whole",
            "give the file in diffusers' layout",
        ) from error
    except (ValueError, OSError, RuntimeError, SafetensorError) as error:
        raise RequestError(
            place, f"can't be applied: {error}", "give a LoRA of this model"
        ) from error
    return differences
