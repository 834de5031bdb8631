# SPDX-License-Identifier: Apache-2.0
"""Shared by the policy tests: the NumPy transcription, and random runs."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
