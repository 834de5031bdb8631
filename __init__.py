# SPDX-License-Identifier: Apache-2.0
"""Freewheel: compile diffusion transformers at their cache boundaries, and let engines rest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .telemetry import turn_off

if TYPE_CHECKING:
    from .runtime.attach import FreewheelTransformer, attach

    __version__: str

__all__ = ["FreewheelTransformer", "__version__", "attach"]

turn_off()


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is first asked for, so that ``--help`` stays quick."""
    if name == "__version__":
        from importlib.metadata import version

        return version("freewheel")
    if name in ("FreewheelTransformer", "attach"):
        from .runtime import attach as module

        return getattr(module, name)
    raise AttributeError(f"module 'freewheel' has no attribute '{name}'")
