# SPDX-License-Identifier: Apache-2.0
"""What holds for every policy with a threshold: 0 computes every step, bit for bit as uncached."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from freewheel.bundle.reader import Bundle
from freewheel.policies import policies, policy_class
from freewheel.policies.setting import CacheSetting
from freewheel.runtime.model import Model
from freewheel.runtime.session import Session

WITH_THRESHOLD = sorted(n for n, p in policies().items() if "threshold" in p.spec.parameters)


@pytest.fixture(scope="module")
def sessions(tiny_bundle: Bundle) -> tuple[Session, Session]:
    model = Model(tiny_bundle, "onnxruntime")
    return Session(model), Session(model)


def run(
    session: Session,
    setting: CacheSetting,
    steps: int,
    seed: int,
    branches: tuple[str, ...] = ("cond", "uncond"),
) -> dict[str, list[torch.Tensor]]:
    """Return the outputs of each branch; their latents are their own, whatever else runs."""
    found: dict[str, list[torch.Tensor]] = {branch: [] for branch in branches}
    for branch in branches:
        generator = torch.Generator().manual_seed(seed + len(branch))
        states = {"text_states": torch.randn(1, 5, 24, generator=generator)}
        session.set_prompt(branch, states)
    session.begin(torch.linspace(999, 20, steps), setting)
    for step in range(steps):
        for branch in branches:
            generator = torch.Generator().manual_seed(1000 * seed + 10 * step + len(branch))
            latents = torch.randn(1, 4, 2, 4, 4, generator=generator)
            found[branch].append(session.step(branch, step, {"latents": latents}).clone())
    return found


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_there_are_policies_with_a_threshold() -> None:
    assert {"teacache", "custom", "magcache"} <= set(WITH_THRESHOLD)


@pytest.mark.parametrize("policy", WITH_THRESHOLD)
@given(draw=st.data())
@settings(max_examples=10, suppress_health_check=list(HealthCheck))
def test_threshold_zero_equals_uncached(
    sessions: tuple[Session, Session], policy: str, draw: st.DataObject
) -> None:
    steps, seed = draw.draw(st.integers(2, 8)), draw.draw(st.integers(0, 50))
    known = sessions[0].manifest.signals.keys()
    signals = [s for s in policy_class(policy).spec.signals if s in known]
    signal = draw.draw(st.sampled_from(signals)) if signals else None
    setting = CacheSetting(policy=policy, signal=signal, parameters={"threshold": 0.0})
    uncached = run(sessions[1], CacheSetting(), steps, seed)
    found = run(sessions[0], setting, steps, seed)
    assert all(equal(found[b], uncached[b]) for b in found)
    assert all(all(b.computed) for b in sessions[0].statistics.branches.values())


@given(draw=st.data())
@settings(max_examples=25, suppress_health_check=list(HealthCheck))
def test_a_run_forgets_and_branches_never_read_each_other(
    sessions: tuple[Session, Session], draw: st.DataObject
) -> None:
    """A branch alone in a session gives what it gives beside another, after any run before."""
    policy = draw.draw(st.sampled_from([*WITH_THRESHOLD, "taylorseer", "adacache"]))
    if policy_class(policy).spec.one_decision:
        return  # both branches follow one decision, by its law
    parameters = {"threshold": 3.0} if policy in WITH_THRESHOLD else {}
    setting = CacheSetting(policy=policy, parameters=parameters)
    steps, seed = draw.draw(st.integers(2, 8)), draw.draw(st.integers(0, 50))
    run(sessions[0], setting, draw.draw(st.integers(2, 8)), seed + 1)
    together = run(sessions[0], setting, steps, seed)
    alone = run(sessions[1], setting, steps, seed, ("cond",))
    assert equal(together["cond"], alone["cond"])
