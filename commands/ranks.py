# SPDX-License-Identifier: Apache-2.0
"""Join and end the job that a launcher such as torchrun started a command in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..core.errors import RequestError
from ..core.launch import launch

__all__ = ["end_job", "join_job"]


def join_job(bundle: Any, request: Any, device: int | None) -> Any:
    """Return the ranks that a launcher started, once they agree; None in a process started alone.

    Args:
        bundle: An open bundle.
        request: What is asked, a dataclass.
        device: Value of ``--device``.

    Raises:
        RequestError: ``--device`` is given, which would be every rank's.
        RankError: the ranks are not asked the same, or one is lost.
    """
    if launch() is None:
        return None
    from ..bundle.files import sha256_of
    from ..runtime.distributed.ranks import facts_of, join_ranks

    if device is not None:
        raise RequestError(
            f"--device {device}",
            "is for one process, and a launcher started several",
            "leave it out: each rank takes the GPU of its LOCAL_RANK",
        )
    ranks = join_ranks()
    asked = {name: value for name, value in vars(request).items() if name != "checkpoints"}
    for name, value in asked.items():
        if isinstance(value, Path) and value.is_file():
            asked[name] = sha256_of(value)
    backend = getattr(request, "backend", None)
    ranks.compare({**facts_of(bundle, backend), **{n: str(v) for n, v in asked.items()}})
    return ranks


def end_job(ranks: Any) -> None:
    """Leave the job once every rank has done its part."""
    if ranks is not None:
        ranks.tell({}, "ending the job")
        ranks.leave()
