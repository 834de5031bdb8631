# SPDX-License-Identifier: Apache-2.0
"""Every default of a run, resolved into the manifest by `build`: no runtime holds one."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import ceil, prod
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..bundle.dims import nearest_video
from ..bundle.manifest import (
    ConfigEntry,
    GenerationDefaults,
    ResolvedConfig,
    ResolvedGeneration,
)
from ..configs.load import load_config
from ..core.errors import CheckpointError, ConfigError
from ..policies.setting import CacheSetting
from ..runtime.pipeline.call import PipelineCall, diffusers_pipeline
from .cut.declared import Cut
from .sizes import SIDES, STRIDES, latent_scale, read_part

__all__ = [
    "pipeline_defaults",
    "policy_setting",
    "resolve_configs",
    "resolve_generation",
    "scheduler_shift",
]

RUN = ResolvedGeneration(
    steps=50,
    height=480,
    width=832,
    frames=81,
    guidance_scale=5.0,
    flow_shift=1.0,
    seed=42,
    text_tokens=512,
)
"""What a run gets that neither its request, nor a config, nor its pipeline says."""

PICTURE_PIXELS = 1024
"""Height and width of a picture where neither its pipeline nor its transformer says."""


def resolve_generation(
    generation: GenerationDefaults, default: ResolvedGeneration = RUN
) -> ResolvedGeneration:
    """Fill in what ``generation`` leaves open.

    Raises:
        ConfigError: a value that no run can take.
    """
    given = generation.model_dump(exclude_none=True)
    try:
        return ResolvedGeneration.model_validate({**default.model_dump(), **given})
    except ValidationError as error:
        found = error.errors(include_url=False)[0]
        raise ConfigError(
            f"config, '{found['loc'][0]}'", f"found {found['input']!r}", str(found["msg"]).lower()
        ) from error


def resolve_configs(
    configs: Mapping[str, ConfigEntry], pipeline: Path | None, cut: Cut
) -> dict[str, ResolvedConfig]:
    """Fill in what configs leave open: from the first one, then the pipeline, then `RUN`.

    Args:
        configs: Name → config; the first is the default.
        pipeline: Folder of the diffusers pipeline, or None.
        cut: The model, cut: a size that nobody asks for is the nearest that it takes.

    Raises:
        ConfigError: a value that no run can take.
        CheckpointError: the scheduler's flow shift is no number.
    """
    told = {**pipeline_defaults(pipeline), "flow_shift": scheduler_shift(pipeline)}
    default = RUN.model_copy(update=told)
    scale = latent_scale(cut, pipeline)
    sizes = {n: nearest_video(n, getattr(default, n), scale, cut.dims) for n in SIDES}
    default = default.model_copy(update=sizes)
    resolved = {}
    for name, config in configs.items():
        generation = resolve_generation(config.generation, default)
        resolved[name] = ResolvedConfig(cache=config.cache, generation=generation)
        default = resolved[next(iter(resolved))].generation
    return resolved


def pipeline_defaults(pipeline: Path | None) -> dict[str, Any]:
    """Return what a pipeline's call takes where nothing is asked for.

    Args:
        pipeline: Folder of the diffusers pipeline, or None.

    Returns:
        Fields of `ResolvedGeneration`; those that the call leaves to the pipeline's parts are read
        from the transformer's config.
    """
    pipeline_class = diffusers_pipeline(read_part(pipeline, "model_index.json").get("_class_name"))
    if pipeline_class is None:
        return {}
    transformer = read_part(pipeline, "transformer/config.json")
    call = PipelineCall(pipeline_class, embeds_guidance=bool(transformer.get("guidance_embeds")))
    fields = ("steps", "height", "width", "frames", "guidance_scale", "text_tokens")
    told = {field: call.default(field) for field in fields}
    vae = read_part(pipeline, "vae/config.json")
    size = transformer.get("sample_size")
    usual: dict[str, Any] = {}
    if call.makes_sound:
        usual = {"frames": _sound_latents(call.seconds, vae) or size}
        size = None
    elif not call.makes_video:
        usual = {"frames": 1}
        if "height" in call.parameters:
            usual |= {"height": PICTURE_PIXELS, "width": PICTURE_PIXELS}
    height, width = size if isinstance(size, list) else (size, size)
    stored = {
        "height": transformer.get("sample_height") or height,
        "width": transformer.get("sample_width") or width,
    }
    pixels = _pixels(vae)
    usual |= {side: latents * pixels for side, latents in stored.items() if latents}
    found = {**usual, **{field: value for field, value in told.items() if value is not None}}
    return {field: value for field, value in found.items() if value is not None}


def _sound_latents(seconds: float | None, vae: Mapping[str, Any]) -> int | None:
    """Return the latents of so much sound; None where the VAE's config does not tell."""
    rate, strides = vae.get("sampling_rate"), vae.get("downsampling_ratios")
    if not (seconds and rate and strides):
        return None
    latents: float = seconds * rate / prod(strides)
    return ceil(latents)


def _pixels(vae: Mapping[str, Any]) -> int:
    """Return the height and width that one latent stands for, as diffusers' pipelines count it."""
    told = next((vae[key] for key in STRIDES["pixels"] if vae.get(key)), None)
    return int(told or 2 ** (len(vae.get("block_out_channels", range(4))) - 1))


def policy_setting(name: str, signals: Collection[str]) -> CacheSetting:
    """Return what a policy runs with where it is asked for by name.

    Args:
        name: Of the policy.
        signals: Kinds that the model gives; another one is left to the policy's order.
    """
    try:
        setting = load_config(name).setting()
    except ConfigError:  # its tables come with a request, as those of `solved`
        setting = CacheSetting(policy=name)
    if setting.signal is None or setting.signal in signals:
        return setting
    return setting.model_copy(update={"signal": None})


def scheduler_shift(pipeline: Path | None, part: str = "scheduler") -> float:
    """Return the flow shift of a pipeline's scheduler, by its part's name; 1 where there is none.

    Raises:
        CheckpointError: it is no number above 0.
    """
    config = read_part(pipeline, f"{part}/scheduler_config.json")
    own = config.get("flow_shift") or config.get("shift") or RUN.flow_shift
    if not isinstance(own, int | float) or not own > 0:
        where = f"{pipeline}/{part}/scheduler_config.json"
        raise CheckpointError(where, f"the flow shift is {own!r}", "give a number")
    return float(own)
