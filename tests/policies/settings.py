# SPDX-License-Identifier: Apache-2.0
"""One table of settings that together reach every branch of every policy and guard."""

from __future__ import annotations

from freewheel.policies.setting import CacheSetting, GuardSetting

FAST = {
    "codebook_thresholds": [0.08, 0.16, 0.24, 0.32, 0.4, 1.0],
    "codebook_skips": [6, 5, 4, 3, 2, 1],
}
PLAIN_1_3B = [2.39676752e3, -1.31110545e3, 2.01331979e2, -8.29855975, 1.37887774e-1]
NEUTRAL = {"moreg_power": 0.0, "mograd": 0.0}

RATIOS = [1.0, 0.97, 1.04, 0.99, 0.95, 1.01, 0.98, 1.03, 0.96, 0.93]
SCHEDULES = {
    (0, 2, 5): ([1.1], [1.4, -0.4], [1.6, -0.5], [0.9, 0.2, -0.1]),
    (0, 1, 3, 5): ([1.5, -0.5], [1.8, -1.1, 0.3], [1.9, -1.2, 0.4, -0.1]),
}
"""Computed steps of 7 → the mix of each reused one."""


def solved_tables(steps: int, schedules: dict[tuple[int, ...], object]) -> dict[str, object]:
    """Return the parameters of ``solved`` that hold some schedules, fewest computed steps first."""
    rows = [row for mixes in schedules.values() for row in mixes]
    history = max(len(row) for row in rows)
    return {
        "computed_steps": len(list(schedules)[-1]),
        "steps": steps,
        "budgets": [len(computed) for computed in schedules],
        "computed": [int(step in computed) for computed in schedules for step in range(200)],
        "mix": [factor for row in rows for factor in (*row, *[0.0] * (history - len(row)))],
        "history": history,
    }


SOLVED = solved_tables(7, SCHEDULES)
MARKS = {name: SOLVED[name] for name in ("computed_steps", "steps", "budgets", "computed")}

SENSITIVITIES = {
    "timesteps": [1000.0, 800.0, 450.0, 200.0],
    "latent_sensitivity": [0.5, 0.8, 1.2, 1.0],
    "timestep_sensitivity": [0.0005, 0.001, 0.0015],
}

SETTINGS: dict[str, CacheSetting] = {
    "off": CacheSetting(policy="off"),
    "tea": CacheSetting(policy="teacache", parameters={"threshold": 0.25}),
    "tea_polynomial": CacheSetting(
        policy="teacache",
        parameters={"threshold": 0.26, "coefficients": PLAIN_1_3B},
        guard=GuardSetting(first_exact=1, last_exact=1),
    ),
    "tea_guarded": CacheSetting(
        policy="teacache",
        parameters={"threshold": 1.5},
        guard=GuardSetting(first_exact=4, last_exact=3, max_consecutive=3, exact_steps=[9]),
    ),
    "tea_total": CacheSetting(
        policy="teacache", parameters={"threshold": 3.0}, guard=GuardSetting(max_reused=5)
    ),
    "custom": CacheSetting(policy="custom", parameters={"threshold": 0.4}),
    "custom_published": CacheSetting(
        policy="custom", parameters={"threshold": 0.4, "trend": 1.0, "trend_decay": 1.0}
    ),
    "taylor_default": CacheSetting(policy="taylorseer"),
    "taylor_3_uneven": CacheSetting(
        policy="taylorseer",
        parameters={"interval": 3, "order": 3},
        guard=GuardSetting(first_exact=2, exact_steps=[10, 11]),
    ),
    "newton_4_uneven": CacheSetting(
        policy="taylorseer",
        parameters={"interval": 5, "order": 4, "variant": "newton"},
        guard=GuardSetting(exact_steps=[2, 3, 8]),
    ),
    "ada": CacheSetting(policy="adacache"),
    "ada_fast": CacheSetting(policy="adacache", parameters={**FAST}),
    "ada_plain": CacheSetting(policy="adacache", parameters={**FAST, **NEUTRAL}),
    "ada_scaled": CacheSetting(
        policy="adacache",
        parameters={"scale_codebook": True, **NEUTRAL},
        guard=GuardSetting(exact_steps=[6]),
    ),
    "mag": CacheSetting(policy="magcache", parameters={"steps": 10, "ratios": RATIOS}),
    "mag_strict": CacheSetting(
        policy="magcache",
        parameters={
            "steps": 10,
            "ratios": RATIOS,
            "threshold": 0.05,
            "max_skip": 2,
            "retention": 0,
        },
        guard=GuardSetting(last_exact=2, exact_steps=[5]),
    ),
    "easy": CacheSetting(policy="easycache", parameters={"threshold": 0.4}),
    "easy_guarded": CacheSetting(
        policy="easycache",
        parameters={"threshold": 0.6},
        guard=GuardSetting(first_exact=5, last_exact=2, max_consecutive=3, exact_steps=[11]),
    ),
    "firstblock": CacheSetting(policy="firstblock", parameters={"threshold": 0.2}),
    "firstblock_guarded": CacheSetting(
        policy="firstblock",
        parameters={"threshold": 0.4},
        guard=GuardSetting(first_exact=2, last_exact=1, max_consecutive=4, exact_steps=[9]),
    ),
    "solved": CacheSetting(policy="solved", parameters=SOLVED),
    "solved_fewer": CacheSetting(policy="solved", parameters={**SOLVED, "computed_steps": 3}),
    "solved_guarded": CacheSetting(
        policy="solved", parameters=SOLVED, guard=GuardSetting(first_exact=3, max_consecutive=2)
    ),
    "hermite": CacheSetting(policy="hermite"),
    "hermite_uneven": CacheSetting(
        policy="hermite",
        parameters={"interval": 5, "order": 4, "scale": 0.7},
        guard=GuardSetting(first_exact=2, exact_steps=[8, 11]),
    ),
    "foca": CacheSetting(policy="foca"),
    "foca_short": CacheSetting(
        policy="foca",
        parameters={"interval": 5, "history": 2},
        guard=GuardSetting(last_exact=1, exact_steps=[3, 4, 16]),
    ),
    "foca_long": CacheSetting(
        policy="foca", parameters={"interval": 7, "history": 8}, guard=GuardSetting(first_exact=2)
    ),
    "dmd": CacheSetting(policy="dmd", parameters={"interval": 3}),
    "dmd_pulled": CacheSetting(
        policy="dmd",
        parameters={"interval": 2, "ridge": 0.1, "farthest": 1.0},
        guard=GuardSetting(last_exact=1, exact_steps=[11]),
    ),
    "sencache": CacheSetting(
        policy="sencache",
        parameters={**SENSITIVITIES, "threshold": 0.5, "early_threshold": 0.3},
    ),
    "sencache_strict": CacheSetting(
        policy="sencache",
        parameters={**SENSITIVITIES, "threshold": 0.8, "early": 0.5, "max_skip": 2},
        guard=GuardSetting(last_exact=2, exact_steps=[20]),
    ),
    "spectrum": CacheSetting(policy="spectrum"),
    "spectrum_blended": CacheSetting(
        policy="spectrum",
        parameters={
            "warmup": 3,
            "window": 2.5,
            "growth": 0.4,
            "degree": 2,
            "ridge": 0.5,
            "blend": 0.4,
            "history": 3,
        },
        guard=GuardSetting(last_exact=2, max_consecutive=3, exact_steps=[13]),
    ),
    "seacache": CacheSetting(policy="seacache", parameters={"threshold": 0.4}),
    "seacache_guarded": CacheSetting(
        policy="seacache",
        parameters={"threshold": 0.6, "order": 2, "variant": "newton"},
        guard=GuardSetting(last_exact=1, max_consecutive=2, exact_steps=[9]),
    ),
    "dicache": CacheSetting(policy="dicache", parameters={"threshold": 0.3}),
    "dicache_projection": CacheSetting(
        policy="dicache",
        parameters={
            "threshold": 0.5,
            "retention": 0.0,
            "measure": "projection",
            "farthest_gain": 3.0,
        },
        guard=GuardSetting(max_consecutive=4, exact_steps=[9]),
    ),
    "dbcache": CacheSetting(policy="dbcache", parameters={"threshold": 0.2, "last_blocks": 2}),
    "dbcache_guarded": CacheSetting(
        policy="dbcache",
        parameters={"threshold": 0.4, "first_blocks": 3},
        guard=GuardSetting(first_exact=4, max_consecutive=3, max_reused=9),
    ),
    "dualblock": CacheSetting(policy="dualblock", parameters={"threshold": 0.08}),
    "dualblock_strided": CacheSetting(
        policy="dualblock",
        parameters={"threshold": 0.1, "first_blocks": 1, "last_blocks": 0, "channel_stride": 3},
        guard=GuardSetting(max_consecutive=4, exact_steps=[9]),
    ),
    "dbcache_taylor": CacheSetting(policy="dbcache+taylorseer", parameters={"threshold": 0.3}),
    "taylor_dicache": CacheSetting(policy="taylorseer+dicache", parameters={"interval": 3}),
    "sea_hold": CacheSetting(policy="seacache+hold", parameters={"threshold": 0.3}),
    "tea_spectrum": CacheSetting(
        policy="teacache+spectrum",
        parameters={"threshold": 0.4, "degree": 2, "history": 5, "clock": "sigma"},
        guard=GuardSetting(last_exact=1, exact_steps=[13]),
    ),
    "ada_foca": CacheSetting(policy="adacache+foca", parameters={**FAST, **NEUTRAL, "history": 3}),
    "firstblock_dmd": CacheSetting(policy="firstblock+dmd", parameters={"threshold": 0.2}),
    "easy_hermite": CacheSetting(
        policy="easycache+hermite", parameters={"threshold": 0.4, "order": 3}
    ),
    "spectrum_hold": CacheSetting(policy="spectrum+hold", parameters={"growth": 0.4}),
    "solved_newton": CacheSetting(
        policy="solved+taylorseer",
        parameters={**MARKS, "order": 2, "variant": "newton"},
    ),
}
