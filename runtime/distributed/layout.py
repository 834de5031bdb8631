# SPDX-License-Identifier: Apache-2.0
"""Which ranks share a sequence, and which share the branches of guidance."""

from __future__ import annotations

from dataclasses import dataclass

from ...bundle.manifest import Manifest
from ...core.errors import RequestError
from .ranks import Ranks

__all__ = ["Layout", "branches_of", "layout_of"]

BRANCHES = 2
"""Of classifier-free guidance: ranks beyond them would wait for ever."""


@dataclass(frozen=True)
class Layout:
    """The groups that one rank is in.

    Attributes:
        job: All ranks.
        sequence: Those that share its branch's sequence; None where it has all tokens.
        guidance: Those of which each has another branch, with the same tokens; None where every rank
            runs every branch.
    """

    job: Ranks
    sequence: Ranks | None = None
    guidance: Ranks | None = None


def branches_of(manifest: Manifest, guidance_ranks: int | None) -> int:
    """Return over how many groups of ranks branches are shared out; None chooses.

    All ranks share one sequence where the bundle was built for it, else the branches.
    """
    return guidance_ranks or (BRANCHES if manifest.sequence is None else 1)


def layout_of(ranks: Ranks, manifest: Manifest, guidance_ranks: int | None = None) -> Layout:
    """Divide the ranks of a job; every rank calls it alike.

    Args:
        ranks: All.
        manifest: Of the bundle.
        guidance_ranks: As of `branches_of`; 2 lets half of the ranks share a sequence each.

    Raises:
        RequestError: there are too many or too few ranks for that, or the bundle can't share a sequence.
    """
    branches = branches_of(manifest, guidance_ranks)
    share, rest = divmod(ranks.size, branches)
    if branches not in (1, BRANCHES):
        raise RequestError(
            f"guidance over {branches} ranks",
            f"has {BRANCHES} branches to share out",
            "give 1 or 2",
        )
    if manifest.sequence is None and (branches == 1 or ranks.size != BRANCHES):
        raise RequestError(
            f"{ranks.size} ranks",
            f"have {BRANCHES} branches of guidance to share out",
            f"start {BRANCHES} ranks: torchrun --nproc-per-node {BRANCHES}; more share a sequence "
            "where the bundle was built with --sequence-parallel",
        )
    if rest:
        raise RequestError(
            f"{ranks.size} ranks",
            f"are no {BRANCHES} equal groups, one for each branch of guidance",
            "start an even number of ranks",
        )
    if branches == 1:
        return Layout(ranks, sequence=ranks)
    if share == 1:
        return Layout(ranks, guidance=ranks)
    groups = [list(range(first, first + share)) for first in (0, share)]
    return Layout(
        ranks,
        sequence=ranks.divided(groups),
        guidance=ranks.divided([list(pair) for pair in zip(*groups, strict=True)]),
    )
