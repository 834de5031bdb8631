# SPDX-License-Identifier: Apache-2.0
"""Many sessions over one model, at random and at once, give what fresh ones give."""

from __future__ import annotations

import gc
import random
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch

from freewheel.bundle.reader import Bundle
from freewheel.policies.setting import CacheSetting
from freewheel.runtime.model import Model
from freewheel.runtime.session import Session

SETTINGS = [
    CacheSetting(),
    CacheSetting(policy="teacache", signal="temb", parameters={"threshold": 4.0}),
    CacheSetting(policy="teacache", signal="modulated_input", parameters={"threshold": 0.6}),
    CacheSetting(policy="taylorseer", parameters={"interval": 3, "order": 2}),
    CacheSetting(policy="adacache"),
    CacheSetting(policy="custom", parameters={"threshold": 4.0}),
]


@dataclass(frozen=True)
class Request:
    """One run, drawn at random; ``stop`` cuts it off after so many steps."""

    setting: int
    steps: int
    size: tuple[int, int, int]
    tokens: int
    guided: bool
    seed: int
    stop: int | None

    @classmethod
    def draw(cls, rng: random.Random) -> Request:
        steps = rng.randrange(2, 9)
        return cls(
            setting=rng.randrange(len(SETTINGS)),
            steps=steps,
            size=rng.choice([(3, 4, 6), (1, 8, 4), (2, 4, 4)]),
            tokens=rng.choice([3, 5]),
            guided=rng.random() < 0.5,
            seed=rng.randrange(5),
            stop=rng.randrange(steps) if rng.random() < 0.25 else None,
        )

    def run(self, session: Session) -> torch.Tensor | None:
        """Return the last latents, or None where the run was cut off, mid-step where guided."""
        generator = torch.Generator().manual_seed(self.seed)
        branches = ("cond", "uncond") if self.guided else ("cond",)
        for branch in branches:
            states = torch.randn(1, self.tokens, 24, generator=generator)
            session.set_prompt(branch, {"text_states": states})
        session.begin(torch.linspace(999, 30, self.steps), SETTINGS[self.setting])
        latents = torch.randn(1, 4, *self.size, generator=generator)
        for step in range(self.steps):
            output = session.step("cond", step, {"latents": latents}).clone()
            if step == self.stop:
                return None
            if self.guided:
                output += session.step("uncond", step, {"latents": latents})
            latents = latents - output / self.steps
        return latents


def same(found: torch.Tensor | None, expected: torch.Tensor | None) -> bool:
    return found is expected is None or torch.equal(found, expected)


@pytest.mark.parametrize("runs", [50, pytest.param(500, marks=pytest.mark.nightly)])
def test_runs_of_one_session_equal_fresh_ones(tiny_bundle: Bundle, runs: int) -> None:
    rng = random.Random(0)
    model = Model(tiny_bundle, "onnxruntime")
    session = Session(model)
    fresh: dict[Request, torch.Tensor | None] = {}
    for _ in range(runs):
        request = Request.draw(rng)
        if request not in fresh:
            fresh[request] = request.run(Session(model))
        assert same(request.run(session), fresh[request]), request


@pytest.mark.parametrize("each", [3, pytest.param(10, marks=pytest.mark.nightly)])
def test_eight_sessions_at_once_equal_fresh_ones(tiny_bundle: Bundle, each: int) -> None:
    rng = random.Random(1)
    model = Model(tiny_bundle, "onnxruntime")
    lists = [[Request.draw(rng) for _ in range(each)] for _ in range(8)]
    expected = [[r.run(Session(model)) for r in requests] for requests in lists]
    together = threading.Barrier(8)

    def serve(requests: list[Request]) -> list[torch.Tensor | None]:
        session = Session(model)
        together.wait()
        return [request.run(session) for request in requests]

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(serve, lists))
    for mine, theirs in zip(found, expected, strict=True):
        assert all(same(a, b) for a, b in zip(mine, theirs, strict=True))


def held() -> tuple[Counter[str], int]:
    """Count the objects of our classes and of the engines', and the bytes of all tensors."""
    gc.collect()
    counts: Counter[str] = Counter()
    tensor_bytes = 0
    for found in gc.get_objects():
        kind = type(found)
        if str(kind.__module__).startswith(("freewheel", "onnxruntime")):
            counts[kind.__qualname__] += 1
        if kind is torch.Tensor:
            tensor_bytes += found.nbytes
    return counts, tensor_bytes


def test_runs_leave_nothing_behind(tiny_bundle: Bundle) -> None:
    """Counted: resident memory depends on the allocator and the machine's load."""
    model = Model(tiny_bundle, "onnxruntime")
    session = Session(model)
    requests = [Request.draw(random.Random(i)) for i in range(10)]
    after = []
    for _ in range(3):
        for request in requests:
            request.run(session)
        after.append(held())
    # What other tests left may go meanwhile; nothing may come.
    grown = after[2][0] - after[0][0]
    assert not grown
    assert after[2][1] <= after[0][1]
    assert after[0][0]["Session"] >= 1
