# SPDX-License-Identifier: Apache-2.0
"""What a build is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..bundle.manifest import ConfigEntry
from ..core.dtypes import Precision
from ..engines.base import Backend, Target
from .checkpoints.checkpoint import Float8
from .cut.row import Row
from .profiles import BuildSizes

__all__ = ["BuildRequest"]


@dataclass(frozen=True)
class BuildRequest:
    """What to build.

    Attributes:
        model: A diffusers folder, a transformer's single file, or a hub id.
        out: The bundle's folder.
        backends: Compile the engines; the first is what runs use by default.
        configs: Name → config to carry; the first is the default. What they leave open is filled
            in (`compiler/defaults.py`).
        policies: Names of policies and pairs to carry beside ``off`` and those of the configs; None
            carries every policy.
        row: What a class takes that the table has no row of (`compiler.cut.learn`).
        precision: Precision of ``body``.
        weights: Block templates with weights as inputs, or groups of blocks with weights inside.
            ``baked`` computed 2 to 11 % faster on a CPU at 180 and 1,560 tokens
            (`docs/measurements/speed.md`), for engines of one checkpoint alone and no LoRA at run.
        group_blocks: Blocks per group of the baked form; None takes as many as 4 GiB of weights.
        revision: Commit of a hub checkpoint.
        replace: Whether an existing bundle may be replaced.
        target: Devices and options of backends that are told them (`ProfiledBackend`); precision
            and profiles are each graph's own.
        sizes: What engines of those backends are to serve.
        cache: Folder of what saves time in the next build: graphs and engines without weights
            (`Store`), and the caches of such backends. None keeps nothing.
        dump: Folder for graphs as text after each pass, or None.
        with_text_encoder: Whether to carry the text encoder as a graph, for programs without Python.
        with_vae: Likewise for the VAE's decoder, at the default config's size.
        pipeline: Folder or hub id of the pipeline, where ``model`` is a transformer alone.
        low_noise: Folder or file of the second expert, where ``model`` is the first alone.
        variant: Which of several sets of weights the folders have, as ``fp16``.
        float8: Keep weights of the checkpoint that are in float8_e4m3fn where every backend takes
            them as inputs, or convert them to the graphs' own dtypes, which LoRAs need.
        sequence_parallel: Carry graphs for ranks that share one sequence, beside those for one
            process.
    """

    model: str
    out: Path
    backends: Sequence[Backend]
    configs: Mapping[str, ConfigEntry]
    policies: Sequence[str] | None = None
    row: Row | None = None
    precision: Precision = "float32"
    weights: Literal["inputs", "baked"] = "inputs"
    group_blocks: int | None = None
    revision: str | None = None
    replace: bool = False
    target: Target = field(default_factory=Target)
    sizes: BuildSizes = field(default_factory=BuildSizes)
    cache: Path | None = None
    dump: Path | None = None
    with_text_encoder: bool = False
    with_vae: bool = False
    pipeline: str | None = None
    low_noise: str | None = None
    variant: str | None = None
    float8: Float8 = "keep"
    sequence_parallel: bool = False
