"""Generation values of a run, for tests that need a few of them."""

from __future__ import annotations

from freewheel.bundle.manifest import GenerationDefaults, ResolvedGeneration
from freewheel.compiler.defaults import resolve_generation


def generation_of(**values: float) -> ResolvedGeneration:
    """Return these values, and for the rest what `build` resolves."""
    return resolve_generation(GenerationDefaults(**values))
