# SPDX-License-Identifier: Apache-2.0
"""Let the tests of the cutter share `cases`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from cases import Case, case


@pytest.fixture(scope="session")
def wan() -> Case:
    """Wan text-to-video: the one that most tests look at."""
    return case("wan")
