# SPDX-License-Identifier: Apache-2.0
"""Items over two ranks, of which one is slower than the timeout, and at last silent."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import freewheel
from freewheel.core.errors import RankError
from freewheel.tuning.shares import Shares

BEATS, SECONDS = 10, 0.5  # 5 s of work in all, of a timeout of 3 s

if __name__ == "__main__":
    ranks = freewheel.join_ranks()
    shares = Shares(ranks)
    mine = [item for item in range(5) if shares.is_mine(item)]
    if not ranks.leads:
        for _ in range(BEATS):
            time.sleep(SECONDS)
            shares.beat()
    items = shares.gather_json({item: ["item", item, item / 3] for item in mine}, "gathering")
    found = {"items": items, "mine": mine, "silence": ""}
    try:
        if ranks.leads:
            ranks.wait_for_all("waiting")
    except RankError as error:
        found["silence"] = str(error)
    if not ranks.leads:
        time.sleep(BEATS * SECONDS)
    (Path(sys.argv[1]) / f"rank{ranks.rank}.json").write_text(json.dumps(found))
