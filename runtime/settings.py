# SPDX-License-Identifier: Apache-2.0
"""From what a user names to a resolved setting: configs of the bundle, shipped ones, files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ..bundle.manifest import (
    ConfigEntry,
    GenerationDefaults,
    Manifest,
    PolicyEntry,
    ResolvedConfig,
)
from ..bundle.reader import Bundle
from ..bundle.sampler import check_sampler, list_sampler
from ..configs.load import load_config
from ..core.errors import ConfigError, nearest
from ..policies import is_policy
from ..policies.config import CachingConfig
from ..policies.overrides import apply_overrides
from ..policies.setting import CacheSetting

__all__ = [
    "carried_policy",
    "choose_setting",
    "config_entries",
    "config_entry",
    "other_size",
    "warn_of_ignored",
]

Warn = Callable[[str], None]


def config_entry(config: CachingConfig) -> ConfigEntry:
    """Resolve a config to what manifests carry.

    Raises:
        RequestError: the config's sampler is not known.
    """
    if config.sampler is not None:
        check_sampler(config.sampler)
    given = config.sample_guide_scale
    guidance, second = given if isinstance(given, list) else (given, None)
    if config.enable_cfg is False:
        guidance, second = 1.0, None
    steps, sampler = config.infer_steps, config.sampler
    if config.denoising_step_list is not None:
        steps, sampler = len(config.denoising_step_list), list_sampler(config.denoising_step_list)
    return ConfigEntry(
        cache=config.setting(),
        generation=GenerationDefaults(
            steps=steps,
            height=config.target_height,
            width=config.target_width,
            frames=config.target_video_length,
            guidance_scale=guidance,
            flow_shift=config.sample_shift,
            seed=config.seed,
            text_tokens=config.text_len,
            sampler=sampler,
            guidance_scale_2=None if second == guidance else second,
        ),
    )


def config_entries(names: Sequence[str], warn: Warn) -> dict[str, ConfigEntry]:
    """Load configs by name or file, by the name each goes by.

    Raises:
        ConfigError: a file with faults, or nothing goes by a name.
    """
    entries = {}
    for name in names:
        config = load_config(name)
        warn_of_ignored(config, name, warn)
        entries[config.name] = config_entry(config)
    return entries


def warn_of_ignored(config: CachingConfig, name: str, warn: Warn) -> None:
    """Name the keys of a config that change nothing here, all in one warning."""
    if config.ignored:
        keys = ", ".join(f"'{key}'" for key in config.ignored)
        warn(f"no effect here of {keys} in '{name}'")


def choose_setting(
    bundle: Bundle,
    cache: CacheSetting | str | Path | None,
    overrides: Mapping[str, str],
    warn: Warn,
) -> ResolvedConfig:
    """Find what ``cache`` names and apply overrides.

    Args:
        bundle: Its configs come first, then its policies, shipped configs and files.
        cache: A name, a file, a resolved setting, or None for the bundle's default config.
        overrides: ``--set`` pairs.
        warn: Told of ignored keys.

    Returns:
        The setting with generation values; those of the bundle's default config where what was
        named has none.

    Raises:
        ConfigError: nothing goes by that name, a file with faults, a policy that the bundle has not,
            or a bad override.
    """
    manifest = bundle.manifest
    default = manifest.configs[manifest.default_config]
    entry: ConfigEntry = default
    if cache is None:
        pass
    elif isinstance(cache, CacheSetting):
        entry = ConfigEntry(cache=cache)
    elif str(cache) in manifest.configs:
        entry = manifest.configs[str(cache)]
    elif str(cache) in manifest.policies:
        entry = ConfigEntry(cache=manifest.policies[str(cache)].setting)
    else:
        entry = next(iter(config_entries([str(cache)], warn).values()))
    given = entry.generation.model_dump(exclude_none=True)
    generation = default.generation.model_copy(update=given)
    setting, spec = entry.cache, carried_policy(manifest, entry.cache.policy).spec
    if overrides:
        setting = apply_overrides(setting, overrides, spec)
    return ResolvedConfig(cache=setting, generation=generation)


def carried_policy(manifest: Manifest, name: str) -> PolicyEntry:
    """Return a policy of a bundle.

    Raises:
        ConfigError: the bundle has none of that name.
    """
    if name not in manifest.policies:
        hint = nearest(name, list(manifest.policies))
        if is_policy(name):
            hint = f"each policy or pair has a graph of its own: build with --policy {name} too"
        raise ConfigError(f"policy '{name}'", "is not in the bundle", hint)
    return manifest.policies[name]


def other_size(manifest: Manifest, generation: GenerationDefaults) -> str | None:
    """Say for which size a config was made, where that is not the bundle's own.

    Args:
        manifest: The bundle's; its own size is that of its default config.
        generation: The config's values.
    """
    own = manifest.configs[manifest.default_config].generation
    names = ("width", "height", "frames")
    pairs = [(getattr(generation, n), getattr(own, n)) for n in names]
    if all(None in pair or pair[0] == pair[1] for pair in pairs):
        return None
    made, usual = (_size_text(generation, own), _size_text(own, own))
    return f"was made for {made}, and the bundle's own size is {usual}"


def _size_text(generation: GenerationDefaults, own: GenerationDefaults) -> str:
    values = own.model_copy(update=generation.model_dump(exclude_none=True))
    return f"{values.width}x{values.height}, {values.frames} frames"
