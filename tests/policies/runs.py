# SPDX-License-Identifier: Apache-2.0
"""Random runs, and how one is folded through a law and through its NumPy transcription."""

from __future__ import annotations

import numpy as np
import numpy_forecasts
import numpy_reference as reference
import torch

from freewheel.policies import policy_class
from freewheel.policies.base import Step
from freewheel.policies.deadline import Pace
from freewheel.policies.decision_loop import DecisionLoop, DecisionRecord, difference_gram
from freewheel.policies.setting import CacheSetting
from freewheel.policies.spec import PolicySpec

IDENTITY = [1.0, 0.0]
TIE = 1e-5
"""Relative distance from the threshold within which two correct float32 laws may differ."""


def random_run(
    seed: int, steps: int, *, frames: int = 4, change: float = 0.1
) -> dict[str, np.ndarray]:
    """Return a smooth random signal [steps, 3, 8], feature [steps, frames, 5, 6] and residual."""
    rng = np.random.default_rng(seed)

    def walk(*shape: int) -> np.ndarray:
        pace = change * rng.uniform(0.2, 2.0, (steps, *[1] * len(shape)))
        moves = rng.standard_normal((steps, *shape)) * pace
        return (np.cumsum(moves, axis=0) + rng.standard_normal(shape)).astype(np.float32)

    return {"signal": walk(3, 8), "feature": walk(frames, 5, 6), "residual": walk(7)}


def step_at(index: int, computed: list[int], size: int = 5, count: int = 100) -> Step:
    """Return where a run of ``count`` steps stands, whose noise level falls evenly from 1."""
    steps = torch.tensor((computed + [-1] * size)[:size])
    sigmas = torch.where(steps >= 0, 1 - steps / count, 0.0)
    return Step(
        step_index=torch.tensor(index),
        step_count=torch.tensor(count),
        computed_steps=steps,
        must_compute=torch.tensor(False),
        timestep=torch.tensor(1000.0 * (1 - index / count)),
        sigma=torch.tensor(1 - index / count),
        computed_timesteps=1000 * sigmas,
        computed_sigmas=sigmas,
        **{name: torch.tensor(seconds) for name, seconds in Pace()._asdict().items()},
    )


def fold(law: DecisionLoop, run: dict[str, np.ndarray]) -> list[DecisionRecord]:
    """Decide about every step of the run."""
    records = []
    for t in range(law.step_count):
        feature = None if law.last_computed is None else run["feature"][law.last_computed]
        gram = None
        if "gram" in law.spec.kept:
            held = [run["residual"][s] for s in law.computed_steps]
            gram = difference_gram(held, law.spec.history.maximum)
        records.append(law.decide(run["signal"][t], feature, gram))
    return records


def forecasts(records: list[DecisionRecord], residual: np.ndarray) -> list[np.ndarray | None]:
    """Mix past residuals as a session would: None on computed steps."""
    history: list[np.ndarray] = []
    mixed: list[np.ndarray | None] = []
    for t, record in enumerate(records):
        if record.compute:
            history.insert(0, residual[t].astype(np.float64))
            mixed.append(None)
        else:
            mixed.append(sum(m * r for m, r in zip(record.mix, history, strict=False)))
    return mixed


def reference_law(
    setting: CacheSetting, parameters: dict[str, object], step_count: int
) -> reference._Law:
    """Return the NumPy transcription of a setting with resolved parameters."""
    p = dict(parameters)
    if "+" in setting.policy:
        return joined(setting.policy, p, step_count)
    if setting.policy == "off":
        return reference.Off()
    if setting.policy in ("teacache", "custom"):
        law = reference.TeaCache if setting.policy == "teacache" else reference.Custom
        return law(**p)
    if setting.policy == "taylorseer":
        return reference.TaylorSeer(p["interval"], p["order"], p["variant"])
    if setting.policy == "magcache":
        return reference.MagCache(**p, step_count=step_count)
    if setting.policy in ("easycache", "firstblock"):
        law = reference.EasyCache if setting.policy == "easycache" else reference.FirstBlock
        return law(**p)
    if setting.policy == "dbcache":
        return reference.DBCache(**p)
    if setting.policy == "dualblock":
        return reference.DualBlock(**p)
    if setting.policy == "seacache":
        return reference.SeaCache(**p)
    if setting.policy in ("sencache", "dicache"):
        law = reference.SenCache if setting.policy == "sencache" else reference.DiCache
        return law(**p, step_count=step_count)
    if setting.policy in ("hermite", "foca", "dmd"):
        laws = {
            "hermite": numpy_forecasts.Hermite,
            "foca": numpy_forecasts.FoCa,
            "dmd": numpy_forecasts.DMD,
        }
        return laws[setting.policy](**p)
    if setting.policy == "spectrum":
        return numpy_forecasts.Spectrum(**p, step_count=step_count)
    if setting.policy == "solved":
        return reference.Solved(**p, step_count=step_count)
    codebook = list(zip(p.pop("codebook_thresholds"), p.pop("codebook_skips"), strict=True))
    return reference.AdaCache(codebook, **p)


def joined(pair: str, parameters: dict[str, object], step_count: int) -> reference._Law:
    """Return the two transcriptions that a pair's name says, each with its own parameters."""

    def alone(name: str, takes_mix: bool) -> reference._Law:
        if name == "hold":
            return reference._Law()
        found = policy_class(name)
        names = {n for n in found.spec.parameters if (n in found.mix.parameters) is takes_mix}
        given = {n: v for n, v in parameters.items() if n in names}
        return reference_law(CacheSetting(policy=name), found.spec.resolve(given), step_count)

    decider, mixer = pair.split("+")
    return reference.Joined(alone(decider, False), alone(mixer, True))


def assert_equals_reference(
    records: list[DecisionRecord], setting: CacheSetting, parameters: dict[str, object], run: dict
) -> None:
    """Compare with the setting's transcription."""
    guard = reference.Guard(**setting.guard.model_dump())
    law = reference_law(setting, parameters, len(records))
    assert_equals_law(records, policy_class(setting.policy).spec, law, guard, run)


def assert_equals_law(
    records: list[DecisionRecord],
    spec: PolicySpec,
    law: reference._Law,
    guard: reference.Guard,
    run: dict,
) -> None:
    """Compare decisions, distances, reused residuals; stops at a tie, where both may be right."""
    expected = reference.run_reference(
        law,
        guard,
        len(records),
        signals=run["signal"] if spec.signals else None,
        features=run["feature"] if spec.feature else None,
        residuals=run["residual"],
    )
    for t, (record, mixed) in enumerate(
        zip(records, forecasts(records, run["residual"]), strict=True)
    ):
        if record.compute != expected.computed[t]:
            assert min(expected.margin[: t + 1]) < TIE, f"step {t} of {law}"
            return
        if record.distance is not None:
            tolerance = 1e-6 + 2e-5 * abs(expected.distance[t]) + expected.noise[t]
            assert abs(record.distance - expected.distance[t]) <= tolerance
        if mixed is not None:
            np.testing.assert_allclose(mixed, expected.forecast[t], rtol=1e-4, atol=1e-4)
