# SPDX-License-Identifier: Apache-2.0
"""Let the tests of every family share `chain` and `bundles`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(1, str(Path(__file__).parents[1] / "cut"))
