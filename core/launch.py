# SPDX-License-Identifier: Apache-2.0
"""Whether a launcher such as ``torchrun`` started this process as one of several."""

from __future__ import annotations

import os
from dataclasses import dataclass

__all__ = ["Launch", "launch"]

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torch.distributed's ``env://`` reads; every launcher of the field sets them."""


@dataclass(frozen=True)
class Launch:
    """This process's place among those started together.

    Attributes:
        rank: 0 … size − 1; rank 0 writes and prints.
        size: Processes, 2 or more.
        local_rank: Place among those of one machine.
    """

    rank: int
    size: int
    local_rank: int


def launch() -> Launch | None:
    """Return this process's place, or None where it was started alone."""
    if not all(os.environ.get(name) for name in VARIABLES):
        return None
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return Launch(rank, size, int(os.environ.get("LOCAL_RANK", rank))) if size > 1 else None
