# SPDX-License-Identifier: Apache-2.0
"""Lets the tests of checkpoints import what this folder and its neighbours share."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
for folder in (HERE, HERE.parent / "cut", HERE.parent / "models"):
    sys.path.insert(0, str(folder))
