"""Sessions: equality with diffusers, isolation of runs, and a step loop that allocates nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers import WanTransformer3DModel

from freewheel.bundle.reader import Bundle
from freewheel.core.errors import ConfigError, RequestError
from freewheel.policies.setting import CacheSetting, GuardSetting
from freewheel.runtime.model import Model
from freewheel.runtime.session import Session

STEPS = torch.linspace(999, 30, 12)

SETTINGS = [
    CacheSetting(),
    CacheSetting(policy="teacache", signal="temb", parameters={"threshold": 4.0}),
    CacheSetting(policy="teacache", signal="modulated_input", parameters={"threshold": 0.6}),
    CacheSetting(policy="taylorseer", parameters={"interval": 3, "order": 2}),
    CacheSetting(policy="adacache"),
    CacheSetting(policy="custom", parameters={"threshold": 4.0}),
    # Laws forget at each computed step, the count of all reuses does not: it shows a stale state.
    CacheSetting(policy="taylorseer", parameters={"interval": 3}, guard=GuardSetting(max_reused=3)),
]


def inputs(
    seed: int, batch: int = 1, frames: int = 3, height: int = 4, width: int = 6
) -> torch.Tensor:
    return torch.randn(
        batch, 4, frames, height, width, generator=torch.Generator().manual_seed(seed)
    )


def prompt(seed: int, batch: int = 1, tokens: int = 5) -> torch.Tensor:
    return torch.randn(batch, tokens, 24, generator=torch.Generator().manual_seed(seed))


def run(
    session: Session,
    setting: CacheSetting,
    timesteps: torch.Tensor = STEPS,
    *,
    seed: int = 0,
    branches: tuple[str, ...] = ("cond", "uncond"),
    **size: int,
) -> list[torch.Tensor]:
    """Run a plain Euler loop over the session; return every model output."""
    batch = size.get("batch", 1)
    for i, branch in enumerate(branches):
        session.set_prompt(branch, {"text_states": prompt(seed + i, batch)})
    session.begin(timesteps, setting)
    latents, outputs = inputs(seed, **size), []
    for step in range(len(timesteps)):
        answers = [session.step(b, step, {"latents": latents}).clone() for b in branches]
        outputs += answers
        latents = latents - answers[0] / len(timesteps)
    return outputs


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(
    ("batch", "frames", "height", "width", "tokens"), [(1, 3, 4, 6, 5), (2, 1, 8, 4, 9)]
)
def test_uncached_steps_equal_diffusers(
    tiny_bundle: Bundle,
    tiny_checkpoint: str,
    backend: str,
    batch: int,
    frames: int,
    height: int,
    width: int,
    tokens: int,
) -> None:
    reference = WanTransformer3DModel.from_pretrained(tiny_checkpoint)
    session = Session(Model(tiny_bundle, backend))
    latents, states = inputs(3, batch, frames, height, width), prompt(4, batch, tokens)
    session.set_prompt("cond", {"text_states": states})
    session.begin(STEPS)
    for step in range(3):
        found = session.step("cond", step, {"latents": latents})
        with torch.no_grad():
            expected = reference(latents, STEPS[step].expand(batch), states, return_dict=False)[0]
        error = (found - expected).abs().mean() / expected.abs().mean()
        assert error < 1e-5, "float32 engines differ from eager by rounding only"


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: f"{s.policy}-{s.signal}")
def test_runs_through_one_session_equal_runs_through_fresh_ones(
    tiny_bundle: Bundle, setting: CacheSetting
) -> None:
    model = Model(tiny_bundle, "openvino")
    used = Session(model)
    run(used, CacheSetting(policy="adacache"), seed=9, batch=2, width=8)
    run(used, SETTINGS[1], STEPS[:7], seed=5, branches=("cond",))
    # The second run takes over the buffers of the first; another size gets its own.
    for size in ({}, {}, {"frames": 2, "height": 6}):
        expected = run(Session(model), setting, STEPS[:9], **size)
        found = run(used, setting, STEPS[:9], **size)
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("setting", SETTINGS[1:], ids=lambda s: f"{s.policy}-{s.signal}")
def test_policies_reuse_some_steps_and_change_the_output(
    tiny_bundle: Bundle, setting: CacheSetting
) -> None:
    session = Session(Model(tiny_bundle, "openvino"))
    exact = run(session, CacheSetting())
    cached = run(session, setting)
    computed = session.statistics.branches["cond"].computed
    assert computed[0]
    assert 0 < sum(computed) < len(computed)
    assert torch.equal(exact[0], cached[0])
    assert not torch.equal(exact[-1], cached[-1])


def test_threshold_zero_equals_uncached_bit_for_bit(tiny_bundle: Bundle) -> None:
    session = Session(Model(tiny_bundle, "openvino"))
    exact = run(session, CacheSetting())
    for policy in ("teacache", "custom"):
        found = run(session, CacheSetting(policy=policy, parameters={"threshold": 0.0}))
        assert all(torch.equal(a, b) for a, b in zip(exact, found, strict=True))


def test_branches_never_read_each_others_history(tiny_bundle: Bundle) -> None:
    """The cond branch gives the same whether uncond runs beside it or not."""
    session = Session(Model(tiny_bundle, "openvino"))
    setting = CacheSetting(policy="taylorseer", parameters={"interval": 2})
    both = run(session, setting)[0::2]
    alone = run(Session(session.model), setting, branches=("cond",))
    assert all(torch.equal(a, b) for a, b in zip(both, alone, strict=True))


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: f"{s.policy}-{s.signal}")
def test_step_loop_allocates_no_hidden_sized_tensor(
    tiny_bundle: Bundle, setting: CacheSetting
) -> None:
    session = Session(Model(tiny_bundle, "openvino"))
    run(session, setting)
    session.begin(STEPS, setting)
    latents = inputs(0)
    session.step("cond", 0, {"latents": latents})

    def loop() -> None:
        for step in range(1, len(STEPS)):
            session.step("cond", step, {"latents": latents})

    hidden_bytes = 3 * 2 * 3 * 32 * 4
    assert largest_allocation(lambda: torch.zeros(hidden_bytes // 4)) >= hidden_bytes, "control"
    assert largest_allocation(loop) < hidden_bytes


def largest_allocation(function: Callable[[], object]) -> int:
    """Return the bytes of the largest tensor that torch allocates while ``function`` runs."""
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    return max((event.cpu_memory_usage for event in profile.events()), default=0)


def test_outputs_keep_their_address(tiny_bundle: Bundle) -> None:
    session = Session(Model(tiny_bundle, "openvino"))
    session.set_prompt("cond", {"text_states": prompt(0)})
    session.begin(STEPS, SETTINGS[3])
    addresses = {
        session.step("cond", i, {"latents": inputs(0)}).data_ptr() for i in range(len(STEPS))
    }
    assert len(addresses) == 1


def test_exact_steps_are_computed(tiny_bundle: Bundle) -> None:
    session = Session(Model(tiny_bundle, "openvino"))
    guard = GuardSetting(exact_steps=[5], max_consecutive=4)
    run(session, CacheSetting(policy="taylorseer", parameters={"interval": 12}, guard=guard))
    computed = session.statistics.branches["cond"].computed
    assert [i for i, c in enumerate(computed) if c] == [0, 5, 10]


def test_bad_requests_name_where_what_and_what_to_do(tiny_bundle: Bundle) -> None:
    session = Session(Model(tiny_bundle, "openvino"))
    with pytest.raises(
        ConfigError, match=r"policy 'teacash'.*not in the bundle.*did you mean 'teacache'"
    ):
        session.begin(STEPS, CacheSetting(policy="teacash"))
    with pytest.raises(ConfigError, match=r"parameter 'treshold'.*did you mean 'threshold'"):
        session.begin(STEPS, CacheSetting(policy="teacache", parameters={"treshold": 1}))
    with pytest.raises(
        ConfigError, match=r"parameter 'threshold'.*expected a number, found 'high'"
    ):
        session.begin(STEPS, CacheSetting(policy="teacache", parameters={"threshold": "high"}))
    for sigmas in (STEPS[:2], STEPS * float("nan")):
        with pytest.raises(RequestError, match=r"sigmas: are .*finite values; give the scheduler"):
            session.begin(STEPS, sigmas=sigmas)
    session.begin(STEPS)
    with pytest.raises(RequestError, match=r"branch 'cond'.*no prompt.*set_prompt"):
        session.step("cond", 0, {"latents": inputs(0)})
    session.set_prompt("cond", {"text_states": prompt(0)})
    with pytest.raises(RequestError, match=r"input 'latents'.*\[1, 3, 3, 4, 6\].*the bundle takes"):
        session.step("cond", 0, {"latents": torch.zeros(1, 3, 3, 4, 6)})
    with pytest.raises(RequestError, match=r"dimension 'width'.*is 5, which 2 does not divide"):
        session.step("cond", 0, {"latents": torch.zeros(1, 4, 3, 4, 5)})
    with pytest.raises(RequestError, match=r"branch 'cond', step 3.*does not follow step -1"):
        session.step("cond", 3, {"latents": inputs(0)})


@pytest.mark.parametrize("setting", SETTINGS[1:], ids=lambda s: f"{s.policy}-{s.signal}")
def test_a_branch_that_left_steps_out_computes_and_caches_from_there(
    tiny_bundle: Bundle, setting: CacheSetting
) -> None:
    """As guidance intervals do; the branch that stays gives what it gives alone."""
    session = Session(Model(tiny_bundle, "openvino"))
    for index, name in enumerate(("cond", "uncond")):
        session.set_prompt(name, {"text_states": prompt(index)})
    session.begin(STEPS, setting)
    latents, stays = inputs(0), []
    for step in range(12):
        stays.append(session.step("cond", step, {"latents": latents}).clone())
        if step in (0, 1, 6, 7, 8, 9, 10, 11):
            back = session.step("uncond", step, {"latents": latents}).clone()
        if step == 6:
            expected = Session(session.model)
            expected.set_prompt("uncond", {"text_states": prompt(1)})
            expected.begin(STEPS[6:])
            assert torch.equal(back, expected.step("uncond", 0, {"latents": latents}))
        latents = latents - stays[-1] / 12
    computed = session.statistics.branches["uncond"].computed
    assert computed[0]
    assert computed[2:7] == [None] * 4 + [True], "each step is told at its place"
    assert not all(computed[7:]), "it caches again"
    alone = run(Session(session.model), setting, branches=("cond",))
    assert all(torch.equal(a, b) for a, b in zip(stays, alone, strict=True))
    with pytest.raises(RequestError, match=r"step 9: does not follow step 11 of 12; call begin"):
        session.step("cond", 9, {"latents": latents})


def test_a_run_that_can_not_begin_leaves_no_half_of_one(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(Model(tiny_bundle, "openvino"))
    expected = run(session, SETTINGS[3])
    with monkeypatch.context() as patch:
        patch.setattr(session, "_compute_tables", lambda timesteps, beside: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            session.begin(STEPS, SETTINGS[4])
    with pytest.raises(RequestError, match="call begin"):
        session.step("cond", 0, {"latents": inputs(0)})
    found = run(session, SETTINGS[3])
    assert session.statistics.policy == session.resolved.setting.policy == "taylorseer"
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
