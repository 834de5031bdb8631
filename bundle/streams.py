# SPDX-License-Identifier: Apache-2.0
"""Names in a bundle whose model samples several things at once, as a video and its sound.

Each of them has a prefix, the first an empty one, and what belongs to it begins so: ``latents``,
``hidden``, ``history``, ``residual``, ``model_output``, and ``audio_latents``, ``audio_hidden``, ….
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..core.errors import RequestError

__all__ = [
    "HIDDEN",
    "HISTORY",
    "LATENTS",
    "MODEL_OUTPUT",
    "OUT",
    "RESIDUAL",
    "beside",
    "check_samples_one",
    "kept_name",
    "passed_on",
]

LATENTS, MODEL_OUTPUT = "latents", "model_output"
HIDDEN, HISTORY, RESIDUAL = "hidden", "history", "residual"
"""What the first of the things that a model samples is called at each place."""

OUT = "_out"
"""How the outputs of graphs that pass a stream on end."""


def passed_on(outputs: Iterable[str]) -> list[str]:
    """Return the streams that a graph passes on, or begins, of its outputs' names."""
    return [name.removesuffix(OUT) for name in outputs if name.endswith(OUT)]


def beside(name: str, of: str, wanted: str) -> str:
    """Return what belongs to the same thing: ``audio_history`` beside ``audio_hidden``.

    Args:
        name: A name of the thing: ``audio_hidden``.
        of: What that would be of the first thing: ``hidden``.
        wanted: What is looked for, as the first thing's is called: ``history``.
    """
    return name.removesuffix(of) + wanted


def kept_name(stream: str, wanted: str) -> str:
    """Return what a stream's residual or history is called: ``text_history`` of ``text``.

    Args:
        stream: One that `head` begins, or any other that blocks pass on.
        wanted: `RESIDUAL` or `HISTORY`.
    """
    return beside(stream, HIDDEN, wanted) if stream.endswith(HIDDEN) else f"{stream}_{wanted}"


def check_samples_one(latents: Sequence[str], where: str, what: str) -> None:
    """Refuse a model that samples several things where one alone is handled.

    Args:
        latents: `Manifest.latents`.
        where: Which bundle.
        what: Said of who asks: "ranks trade one output a branch".

    Raises:
        RequestError: there are several.
    """
    if len(latents) > 1:
        raise RequestError(
            where,
            f"samples {', '.join(latents)} at once, and {what}",
            "attach the bundle to its diffusers pipeline, in one process",
        )
