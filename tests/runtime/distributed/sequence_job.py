# SPDX-License-Identifier: Apache-2.0
"""What each of several processes runs: a pipeline in one process, and with its sequence shared."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from guidance_job import PIPELINES, latents, settings
from torch import Tensor

import freewheel
from freewheel.bundle.reader import Bundle


def decided(transformer: Any) -> dict[str, Any]:
    """Return what was decided, exactly, and the distances."""
    branches = transformer.statistics.branches
    return {n: (branches[n].computed, branches[n].distance, branches[n].mix) for n in branches}


def near(one: Any, other: Any) -> bool:
    """Say whether distances and mixes are equal up to the rounding of sums."""
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(near, one, other))
    if one is None or other is None:
        return one is other
    return math.isclose(one, other, rel_tol=1e-4, abs_tol=1e-5)


def as_alone(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Say whether two runs took the same decisions."""
    return found.keys() == expected.keys() and all(
        found[n][0] == expected[n][0] and near(found[n][1:], expected[n][1:]) for n in found
    )


def main(kind: str, checkpoint: Path, folder: Path, out: Path, guidance: str, only: str) -> None:
    """Run everything on this rank, and write what it saw."""
    torch.set_num_threads(1)
    ranks = freewheel.join_ranks()
    bundle = Bundle(folder)
    pipe, arguments = PIPELINES[kind](checkpoint)
    pipe.set_progress_bar_config(disable=True)
    known = settings(bundle)
    for name in sorted(known.keys() & {"teacache", "custom"}):  # alike on every rank
        by_tokens = known[name].model_copy(update={"signal": "modulated_input"})
        known[f"{name} by modulated_input"] = by_tokens
    chosen = {n: s for n, s in known.items() if not only or n in only.split(",")}
    expected: dict[str, Tensor] = {}
    decisions: dict[str, Any] = {}
    with freewheel.attached(pipe, bundle, "off") as alone:
        for name, setting in chosen.items():
            alone.setting = setting
            expected[name] = latents(pipe, arguments)
            decisions[name] = decided(alone)
    seen: dict[str, Any] = {}
    with freewheel.attached(
        pipe, bundle, "off", ranks=ranks, guidance_ranks=int(guidance)
    ) as shared:
        for name, setting in chosen.items():
            shared.setting = setting
            found = latents(pipe, arguments)
            apart = (found - expected[name]).norm() / expected[name].norm()
            session = shared.session
            seen[name] = {
                "apart": float(apart),
                "as_alone": as_alone(decided(shared), decisions[name]),
                "computed": {n: b.computed for n, b in shared.statistics.branches.items()},
                "exchanges": {n: c.as_dict() for n, c in shared.exchanges.items()},
                "all_tokens": session.model.dims_of(session._dims)["tokens"],
                "tokens": {
                    n: b.cache.ring.history["hidden"].shape[2]
                    for n, b in session._branches.items()
                    if b.cache is not None and b.cache.ring is not None
                },
            }
    (out / f"rank{ranks.rank}.json").write_text(json.dumps(seen))
    ranks.tell({}, "ending the job")
    ranks.leave()


if __name__ == "__main__":
    kind, *paths, guidance, only = sys.argv[1:]
    main(kind, *(Path(a) for a in paths), guidance, only)
