# SPDX-License-Identifier: Apache-2.0
"""Read a whole config of LightX2V's: beside caching and generation, where the model's files lie.

As a caching config alone such a file is `load.py`'s; here its keys of files, LoRAs and experts count,
and what it leaves out is what LightX2V takes then.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..core.errors import ConfigError, nearest
from ..policies.config import CachingConfig
from .load import parse_config, read_object

__all__ = ["MODEL_CLASSES", "TASKS", "LightX2VConfig", "read_lightx2v"]

MODEL_CLASSES: Mapping[str, bool] = MappingProxyType(
    {"wan2.1": False, "wan2.1_distill": True, "wan2.2_moe": False, "wan2.2_moe_distill": True}
)
"""``--model_cls`` → whether it runs through ``denoising_step_list``."""

TASKS = ("t2v", "i2v")
FPS = 16
HIGH, LOW = "high_noise_model", "low_noise_model"

PARTS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "transformer": ("dit", "high_noise"),
        "low_noise": ("low_noise", "low_noise"),
    }
)
"""Part of the model → what its keys begin with, of one transformer and of two experts."""


@dataclass(frozen=True)
class LightX2VConfig:
    """What a config of LightX2V's says.

    Attributes:
        config: Caching and generation.
        files: Part (``transformer``, ``low_noise``, ``text_encoder``, ``tokenizer``, ``vae``,
            ``image_encoder``) → file or folder that it names.
        takes_image_encoder: False where the file turns it off.
        loras: ``[transformer_2=]FILE:scale``.
        boundary: Of two experts, the fraction of timesteps from which the first denoises.
        fps: Frames per second of the video.
        unread: Keys of the file that this run makes no use of, with the reason.
    """

    config: CachingConfig
    files: Mapping[str, Path]
    takes_image_encoder: bool
    loras: tuple[str, ...]
    boundary: float | None
    fps: int
    unread: tuple[str, ...]


def read_lightx2v(path: Path, model_cls: str, task: str) -> LightX2VConfig:
    """Read a config file.

    Args:
        path: JSON as LightX2V's scripts give it by ``--config_json``.
        model_cls: Their ``--model_cls``.
        task: Their ``--task``.

    Raises:
        ConfigError: a model or task that is not run here, or a key that can't be followed.
    """
    if model_cls not in MODEL_CLASSES:
        raise ConfigError(
            f"--model_cls {model_cls}",
            "is not run here",
            f"{nearest(model_cls, list(MODEL_CLASSES))}; build other models with `freewheel build`",
        )
    if task not in TASKS:
        raise ConfigError(f"--task {task}", "is not run here", f"use one of {', '.join(TASKS)}")
    data = read_object(path)
    has_experts = "moe" in model_cls
    given: dict[str, Any] = {}
    for key in [k for k in data if _is_of_files(k) or k in OWN]:
        given[key] = data.pop(key)
    unread = []
    if not MODEL_CLASSES[model_cls] and data.pop("denoising_step_list", None) is not None:
        unread.append(f"'denoising_step_list' is of the distilled models, and not of '{model_cls}'")
    elif MODEL_CLASSES[model_cls]:
        if "denoising_step_list" not in data:
            raise ConfigError(
                str(path),
                f"has no 'denoising_step_list', which '{model_cls}' runs through",
                'add "denoising_step_list": [1000, 750, 500, 250], or the model\'s own',
            )
        data["infer_steps"] = len(data["denoising_step_list"])
    defaults = {"feature_caching": "NoCaching", "enable_cfg": False}
    config = parse_config({**defaults, **data}, where=str(path), name=path.stem)
    quantised = [k for k in ("t5_quantized", "clip_quantized") if given.get(k)]
    unread += [f"'{key}': the encoder's plain file is taken" for key in quantised]
    return LightX2VConfig(
        config,
        _files(given, has_experts=has_experts),
        given.get("use_image_encoder", True) is not False,
        _loras(path, given.get("lora_configs") or []),
        _boundary(path, given, config) if has_experts else None,
        round(given.get("target_fps") or given.get("fps") or FPS),
        tuple(unread),
    )


OWN = (
    "lora_configs", "lora_dynamic_apply", "boundary", "boundary_step_index", "fps", "target_fps",
    "use_image_encoder", "vae_path", "t5_tokenizer_path", "dit_quantized", "t5_quantized",
    "clip_quantized",
)  # fmt: skip
"""Keys that count here and not in a caching config."""


def _is_of_files(key: str) -> bool:
    return key.endswith(("_original_ckpt", "_quantized_ckpt"))


def _files(given: Mapping[str, Any], *, has_experts: bool) -> dict[str, Path]:
    """Return the files that are named: the quantised one where the file asks for it."""
    kind = "quantized" if given.get("dit_quantized") else "original"
    found = {}
    for part, stems in PARTS.items():
        stem = stems[has_experts]
        if part == "low_noise" and not has_experts:
            continue
        found[part] = given.get(f"{stem}_{kind}_ckpt") or given.get(f"{stem}_original_ckpt")
    found["text_encoder"] = given.get("t5_original_ckpt")
    found["tokenizer"] = given.get("t5_tokenizer_path")
    found["vae"] = given.get("vae_path")
    found["image_encoder"] = given.get("clip_original_ckpt")
    return {part: Path(str(name)).expanduser() for part, name in found.items() if name}


def _loras(path: Path, entries: Any) -> tuple[str, ...]:
    loras = []
    for index, entry in enumerate(entries):
        place = f"{path}, 'lora_configs[{index}]'"
        if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
            raise ConfigError(place, "names no 'path'", 'write {"path": "FILE", "strength": 1.0}')
        strength = entry.get("strength", 1.0)
        if not isinstance(strength, int | float) or not math.isfinite(strength):
            raise ConfigError(place, f"'strength' is {strength!r}", "give a number")
        part = "transformer_2=" if entry.get("name") == LOW else ""
        loras.append(f"{part}{entry['path']}:{strength:g}")
    return tuple(loras)


def _boundary(path: Path, given: Mapping[str, Any], config: CachingConfig) -> float | None:
    """Return where the first expert ends: as the file says, or between two of its steps."""
    index, steps = given.get("boundary_step_index"), config.denoising_step_list
    if steps is None:
        found = given.get("boundary")
        if found is not None and (not isinstance(found, int | float) or not 0 < found < 1):
            raise ConfigError(f"{path}, 'boundary'", f"is {found!r}", "give a number in (0, 1)")
        return found
    if not isinstance(index, int) or not 0 < index < len(steps):
        raise ConfigError(
            f"{path}, 'boundary_step_index'",
            f"is {index!r}, of {len(steps)} steps",
            "give the index of the first step of the second expert",
        )
    shift = config.sample_shift or 1.0
    levels = [shift * x / (1 + (shift - 1) * x) for x in (s / 1000 for s in steps)]
    return (levels[index - 1] + levels[index]) / 2
