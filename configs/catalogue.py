# SPDX-License-Identifier: Apache-2.0
"""Describe the caching configs that ship, to somebody who chooses one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..core.errors import ConfigError, nearest
from .load import load_config, shipped_configs

__all__ = ["COLUMNS", "cells", "describe_configs", "model_of"]

COLUMNS = ("config", "policy", "model", "frames×height×width", "steps", "guidance", "shift")

MODELS = {
    "flux_dev": "FLUX.1 dev",
    "hunyuan_video": "HunyuanVideo",
    "ltx_video": "LTX-Video",
    "shapes_wan": "models/shapes_wan",
    "wan_i2v": "Wan 2.1 image-to-video 14B",
    "wan_t2v": "Wan 2.1 text-to-video",
}
"""How a config's name begins → the model whose runs it was made for."""

SIZES = {"1_3b": " 1.3B", "14b": " 14B"}
"""Part of a config's name → what it adds to the model's."""


def describe_configs(names: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Describe shipped configs.

    Args:
        names: Which, by file stem; none is all.

    Returns:
        One JSON object per config: what is run, and the whole resolved cache setting.

    Raises:
        ConfigError: no config of a name ships.
    """
    shipped = shipped_configs()
    for name in names:
        if name not in shipped:
            raise ConfigError(f"config '{name}'", "does not ship", nearest(name, list(shipped)))
    return [_described(name, shipped[name]) for name in names or shipped]


def model_of(name: str) -> str:
    """Return the model that a shipped config was made for, by the config's name."""
    model = next(model for begin, model in MODELS.items() if name.startswith(begin))
    return model + next((more for part, more in SIZES.items() if part in name), "")


def cells(entry: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what a table says of a config, below `COLUMNS`."""
    size = [entry[key] for key in ("frames", "height", "width")]
    shown = "any" if size == [None] * 3 else "×".join("any" if n is None else str(n) for n in size)
    numbers = (entry[key] for key in ("steps", "guidance_scale", "flow_shift"))
    given = ("any" if n is None else f"{n:g}" for n in numbers)
    return (entry["name"], entry["policy"], entry["model"], shown, *given)


def _described(name: str, path: Path) -> dict[str, Any]:
    config = load_config(path)
    setting = config.setting()
    return {
        "name": name,
        "file": f"{path.parent.name}/{path.name}",
        "model": model_of(name),
        "policy": setting.policy,
        "frames": config.target_video_length,
        "height": config.target_height,
        "width": config.target_width,
        "steps": config.infer_steps,
        "guidance_scale": config.sample_guide_scale,
        "flow_shift": config.sample_shift,
        "seed": config.seed,
        "cache": setting.model_dump(mode="json"),
    }
