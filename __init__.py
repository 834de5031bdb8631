# SPDX-License-Identifier: Apache-2.0
"""Freewheel: compile diffusion transformers at their cache boundaries, and let engines rest."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .core.telemetry import turn_off

if TYPE_CHECKING:
    from .policies.setting import CacheSetting, GuardSetting
    from .runtime.distributed.ranks import Ranks, join_ranks
    from .runtime.pipeline.attach import attach, attached
    from .runtime.pipeline.transformer import FreewheelTransformer

    __version__: str

__all__ = [
    "CacheSetting",
    "FreewheelTransformer",
    "GuardSetting",
    "Ranks",
    "__version__",
    "attach",
    "attached",
    "join_ranks",
]

HOMES = {
    "CacheSetting": "policies.setting",
    "FreewheelTransformer": "runtime.pipeline.transformer",
    "GuardSetting": "policies.setting",
    "Ranks": "runtime.distributed.ranks",
    "attach": "runtime.pipeline.attach",
    "attached": "runtime.pipeline.attach",
    "join_ranks": "runtime.distributed.ranks",
}
"""Name → the module that has it."""

turn_off()


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is first asked for, so that ``--help`` stays quick."""
    if name == "__version__":
        from importlib.metadata import version

        return version("freewheel")
    if name not in HOMES:
        raise AttributeError(f"module 'freewheel' has no attribute '{name}'")
    return getattr(import_module(f".{HOMES[name]}", __name__), name)
