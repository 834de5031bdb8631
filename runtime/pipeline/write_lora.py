# SPDX-License-Identifier: Apache-2.0
"""Write a LoRA of any layout as the one that C++ reads: plain pairs by the bundle's names, float32.

The file is also a LoRA as diffusers writes them, so that `attach` and `run` take it too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from ...bundle.reader import Bundle
from ...core.errors import RequestError
from ...core.output import check_file, replaced_whole
from ..lora import DIFFERENCE, FIRST, LoraFile, check_parts, load_lora
from .adapters import Adapters
from .generate import pipeline_class_of, pipeline_of

__all__ = ["WrittenLora", "write_lora"]

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors")
"""Of the file; a request says it without the end."""

FORMAT = "freewheel_lora"
VERSION = "1"


@dataclass(frozen=True)
class WrittenLora:
    """What was written.

    Attributes:
        path: The file.
        name: How a request says it.
        weights: Of the bundle, that it changes.
        bytes: Of the file.
    """

    path: Path
    name: str
    weights: int
    bytes: int


def write_lora(bundle: Bundle, lora: LoraFile, out: Path, model: Path | None = None) -> WrittenLora:
    """Read a LoRA through its pipeline's own loader and write it for a bundle.

    No weight is read, and of the pipeline its class alone.

    Args:
        bundle: An open bundle.
        lora: A file, and a scale that goes into what is written.
        out: The file to be written, ``NAME.safetensors``; replaced where it exists.
        model: Diffusers folder with the rest of the pipeline, where the bundle has none.

    Raises:
        BundleError: the pipeline can't be found.
        RequestError: the LoRA can't be applied to this bundle, or the name can't be said.
        OutputError: the file can't be written.
    """
    if not NAME.fullmatch(out.name):
        raise RequestError(
            f"--out '{out}'",
            f"'{out.name}' is no plain name that ends in .safetensors",
            "use letters, digits, '_', '.' and '-', as in loras/style.safetensors",
        )
    check_file(out, "--out")
    pipeline_class = pipeline_class_of(*pipeline_of(bundle, model))
    prefixes = {expert.part: expert.prefix for expert in bundle.manifest.experts} or {FIRST: ""}
    check_parts([lora], prefixes)
    part = lora.part
    adapters = Adapters(bundle, prefixes[part], None)
    pipe = _around(pipeline_class, part, adapters.module)
    differences = load_lora(pipe, lora, "written", adapters.module)
    if adapters.has_adapters:
        adapters.module.set_adapters(["written"], [lora.scale])
    factors = {f"{part}.{name}": tensor for name, tensor in adapters.factors().items()}
    for name, tensor in adapters.checked(differences).items():
        factors[f"{part}.{name}{DIFFERENCE}"] = lora.scale * tensor.float()
    marks = {FORMAT: VERSION, "checkpoint_sha256": bundle.manifest.checkpoint.sha256}
    with replaced_whole(out, "choose another --out") as partial:
        save_file(factors, partial, metadata=marks)
    weights = sum(name.endswith((".lora_A.weight", ".lora_B.bias", DIFFERENCE)) for name in factors)
    return WrittenLora(out, out.name.removesuffix(".safetensors"), weights, out.stat().st_size)


def _around(pipeline_class: Any, part: str, transformer: Any) -> Any:
    """Return a pipeline of nothing but a transformer: its loader of LoRAs asks for no more.

    Wan's asks the first expert for the config of the second too, which is the same.
    """
    pipe = pipeline_class.__new__(pipeline_class)
    required, optional = pipeline_class._get_signature_keys(pipeline_class)
    pipe.register_modules(
        **{**dict.fromkeys([*required, *optional]), FIRST: transformer, part: transformer}
    )
    return pipe
