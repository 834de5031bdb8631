# SPDX-License-Identifier: Apache-2.0
"""Freewheel: compile diffusion transformers at their cache boundaries, and let engines rest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .core.telemetry import turn_off

if TYPE_CHECKING:
    from .policies.setting import CacheSetting, GuardSetting
    from .runtime.distributed.ranks import Ranks, join_ranks
    from .runtime.pipeline.attach import FreewheelTransformer, attach, attached

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

turn_off()


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is first asked for, so that ``--help`` stays quick."""
    if name == "__version__":
        from importlib.metadata import version

        return version("freewheel")
    if name in ("CacheSetting", "GuardSetting"):
        from .policies import setting

        return getattr(setting, name)
    if name in ("Ranks", "join_ranks"):
        from .runtime.distributed import ranks

        return getattr(ranks, name)
    if name in ("FreewheelTransformer", "attach", "attached"):
        from .runtime.pipeline import attach as module

        return getattr(module, name)
    raise AttributeError(f"module 'freewheel' has no attribute '{name}'")
