# SPDX-License-Identifier: Apache-2.0
"""Values that are not finite stop a run where they arise, and no later run sees them."""

from __future__ import annotations

import pytest
import torch

from freewheel.bundle.reader import Bundle
from freewheel.core.errors import NotFiniteError, RequestError
from freewheel.policies.setting import CacheSetting
from freewheel.runtime.finite import is_finite
from freewheel.runtime.model import DeviceOptions, Model
from freewheel.runtime.session import Session

STEPS = torch.linspace(999, 30, 8)
SETTING = CacheSetting(policy="taylorseer", parameters={"interval": 2})
SETTINGS = [SETTING, CacheSetting(), CacheSetting(policy="adacache")]


def latents(seed: int = 0) -> torch.Tensor:
    return torch.randn(1, 4, 3, 4, 6, generator=torch.Generator().manual_seed(seed))


def prompt(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {"text_states": torch.full((1, 5, 24), value)}


def run(session: Session, setting: CacheSetting = SETTING) -> list[torch.Tensor]:
    session.set_prompt("cond", prompt())
    session.begin(STEPS, setting)
    return [session.step("cond", i, {"latents": latents(i)}).clone() for i in range(len(STEPS))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_one_bad_value_is_seen_wherever_it_is(dtype: torch.dtype, bad: float) -> None:
    tensor = torch.randn(7, 33, 5).to(dtype)
    assert is_finite(tensor)
    for index in (0, 500, tensor.numel() - 1):
        damaged = tensor.clone()
        damaged.view(-1)[index] = bad
        assert not is_finite(damaged)
    assert not is_finite(torch.tensor([float("inf"), float("-inf")], dtype=dtype))


def test_a_sum_that_overflows_is_no_fault() -> None:
    assert is_finite(torch.full((100,), torch.finfo(torch.float32).max))
    assert is_finite(torch.full((100,), 60000.0, dtype=torch.float16))


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_bad_inputs_are_named_and_the_run_can_go_on(tiny_bundle: Bundle, backend: str) -> None:
    session = Session(Model(tiny_bundle, backend))
    expected = run(session)
    with pytest.raises(RequestError, match=r"branch 'uncond', input 'text_states': .*not finite"):
        session.set_prompt("uncond", prompt(float("nan")))
    session.begin(STEPS, SETTING)
    for step in range(len(STEPS)):
        bad = latents(step)
        bad[0, 1, 2, 3, 4] = float("nan")
        with pytest.raises(RequestError, match=f"branch 'cond', step {step}, input 'latents'"):
            session.step("cond", step, {"latents": bad})
        assert torch.equal(session.step("cond", step, {"latents": latents(step)}), expected[step])


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: s.policy)
@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_values_that_a_segment_makes_stop_the_run_and_are_forgotten(
    tiny_bundle: Bundle, backend: str, setting: CacheSetting
) -> None:
    session = Session(Model(tiny_bundle, backend))
    expected = run(session, setting)
    session.begin(STEPS, setting)
    for step in range(2):
        session.step("cond", step, {"latents": latents(step)})
    # Finite, but the patch embedding's sum is not.
    with pytest.raises(NotFiniteError, match=r"branch 'cond', step 2, segment 'head': .*verify"):
        session.step("cond", 2, {"latents": latents(2).sign() * 3e38})
    with pytest.raises(RequestError, match=r"step 2: follows a step that failed; call begin"):
        session.step("cond", 2, {"latents": latents(2)})
    again = run(session, setting)
    assert all(torch.equal(a, b) for a, b in zip(expected, again, strict=True))


def overflowing(bundle: Bundle, **options: bool) -> Session:
    """A session whose block 1 overflows float32: one of its weights is huge."""
    model = Model(bundle, "onnxruntime", options=DeviceOptions(**options))
    name = "blocks.1.ffn.net.2.weight"
    model._tensors[name] = model.tensor(name).sign() * 3e38
    return Session(model)


def test_the_block_that_overflows_is_named(tiny_bundle: Bundle) -> None:
    session = overflowing(tiny_bundle)
    with pytest.raises(NotFiniteError) as caught:
        run(session)
    assert caught.value.where == "branch 'cond', step 0, segment 'body'"
    assert "first in graph 'block', block 1" in caught.value.what
    assert caught.value.exit_code == 5
    cache = session._branches["cond"].cache
    assert cache.ring.computed_steps == [], "it is no part of the history"


def test_without_the_check_the_run_goes_on(tiny_bundle: Bundle) -> None:
    outputs = run(overflowing(tiny_bundle, check_finite=False))
    assert not torch.isfinite(outputs[-1]).all()


def test_the_check_is_counted(tiny_bundle: Bundle) -> None:
    session = Session(Model(tiny_bundle, "onnxruntime"))
    run(session)
    assert 0 < session.statistics.seconds["check"] < sum(session.statistics.seconds.values())
