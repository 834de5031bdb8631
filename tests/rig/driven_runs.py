# SPDX-License-Identifier: Apache-2.0
"""Runs that drive every policy: each computes some steps of the tiny model and reuses others."""

from __future__ import annotations

from typing import Any

STEPS = 8
PARAMETERS: dict[str, dict[str, Any]] = {
    "off": {},
    "teacache": {"threshold": 1.0},
    "taylorseer": {},
    "adacache": {},
    "custom": {"threshold": 1.0},
    "magcache": {},
    "easycache": {"threshold": 1.0},
    "firstblock": {"threshold": 0.3},
    "solved": {
        "computed_steps": 2,
        "steps": 4,
        "budgets": [2],
        "computed": [1, 0, 1, 0],
        "mix": [1.0, 0.0, 1.5, -0.5],
        "history": 2,
    },
    "spectrum": {"warmup": 2},
    "hermite": {},
    "foca": {},
    "sencache": {"threshold": 100.0, "early": 0.0},
    "dmd": {"interval": 2},
    "seacache": {"threshold": 2.0},
    "dicache": {"threshold": 5.0},
    "dbcache": {"threshold": 0.3, "first_blocks": 1, "last_blocks": 1},
    "dualblock": {"threshold": 0.3, "first_blocks": 1, "last_blocks": 1},
}
"""Policy → parameters."""

POLICIES = tuple(PARAMETERS)
OPTIONS: dict[str, dict[str, bool]] = {
    "plain": {},
    "offload": {"offload": True},
    "graphs": {"cuda_graphs": True},
    "offload and graphs": {"offload": True, "cuda_graphs": True},
}
"""How engines are driven → options of the model."""
