# SPDX-License-Identifier: Apache-2.0
"""Freewheel: compile diffusion transformers at their cache boundaries, and let engines rest."""

from __future__ import annotations

__version__ = "0.1.0"
