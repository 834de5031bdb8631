# SPDX-License-Identifier: Apache-2.0
"""That all ranks begin the same run."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...core.errors import RankError, RequestError
from ..session import Session
from .ranks import brief

__all__ = ["begun", "check_alike", "check_no_deadline"]

SEEN_LATENTS = 8
"""Values of the first latents that are held against the other ranks'."""

ALIKE = 0.05
"""Differences of them that are rounding on another machine; another seed's are of the order of 1."""


def check_no_deadline(session: Session) -> None:
    """Raise `RequestError` where a run has a deadline."""
    if session.resolved.setting.deadline is not None:
        raise RequestError(
            "deadline",
            "is kept by one process's clock, and each rank has its own",
            "set computed_steps, or start the run alone",
        )


def begun(session: Session, latents: Tensor) -> dict[str, Any]:
    """Return what a rank tells the others of the run that it begins."""
    digest = hashlib.sha256(session.timesteps.cpu().numpy().tobytes()).hexdigest()
    facts = {
        "the cache setting": brief(session.resolved.setting.model_dump_json()),
        "the latents' shape": str(list(latents.shape)),
        "the timesteps": f"{session.steps} steps, {digest[:16]}",
    }
    places = torch.linspace(0, latents.numel() - 1, SEEN_LATENTS).long()
    seen = latents.detach().flatten()[places.to(latents.device)].float().tolist()
    return {"facts": facts, "latents": seen}


def check_alike(notes: Sequence[Mapping[str, Any]], members: Sequence[int]) -> None:
    """Raise `RankError` where ranks begin different runs.

    Args:
        notes: Of each rank, what `begun` returned there.
        members: Their ranks in the job.
    """
    for rank, note in zip(members, notes, strict=True):
        for name, wanted in notes[0]["facts"].items():
            if (found := note["facts"][name]) != wanted:
                raise RankError(
                    f"rank {rank}, this run",
                    f"{name} is '{found}', rank {members[0]}'s is '{wanted}'",
                    "make the same calls on every rank",
                )
        pairs = zip(note["latents"], notes[0]["latents"], strict=True)
        if any(abs(found - wanted) > ALIKE for found, wanted in pairs):
            raise RankError(
                f"rank {rank}, this run",
                f"the latents are not rank {members[0]}'s",
                "give the pipeline the same seed on every rank",
            )
