"""The installed wheel has no error of types: half of a lint's time, beside the other tests."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import typecheck


@pytest.mark.skipif(find_spec("mypy") is None, reason="mypy is not installed")
def test_the_package_type_checks() -> None:
    assert typecheck.main() == 0
