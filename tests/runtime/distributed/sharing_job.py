# SPDX-License-Identifier: Apache-2.0
"""Items over two ranks, of which one gives a sign of life before it hands its own over."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import freewheel
from freewheel.tuning.shares import Shares

if __name__ == "__main__":
    ranks = freewheel.join_ranks()
    shares = Shares(ranks)
    mine = [item for item in range(5) if shares.is_mine(item)]
    if not ranks.leads:
        shares.beat()
    items = shares.gather_json({item: ["item", item, item / 3] for item in mine}, "gathering")
    found = {"items": items, "mine": mine}
    (Path(sys.argv[1]) / f"rank{ranks.rank}.json").write_text(json.dumps(found))
