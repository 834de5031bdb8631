"""First and last blocks that always run, against DBCache written down over diffusers' own blocks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from freewheel.bundle.reader import Bundle
from freewheel.compiler.plan import plan
from freewheel.compiler.request import BuildRequest
from freewheel.core.errors import ConfigError
from freewheel.engines import backend
from freewheel.policies.setting import CacheSetting, GuardSetting
from freewheel.runtime.model import DeviceOptions, Model
from freewheel.runtime.session import Session
from freewheel.runtime.settings import config_entries

STEPS = torch.linspace(999, 100, 9)
TOLERANCE = 1e-5
"""Relative L1 of float32 engines and eager PyTorch, as of uncached steps."""


class PlainDBCache(nn.Module):
    """cache-dit's dual block cache in place of a transformer's blocks, as a list of one.

    Each call of the transformer is a step: the first blocks run, their residual is compared with
    that of the last computed step, the middle blocks run or their last residual is added, then the
    last blocks run.
    """

    def __init__(
        self, blocks: nn.ModuleList, first: int, last: int, threshold: float, warm_up: int
    ):
        super().__init__()
        end = len(blocks) - last
        self.first, self.middle, self.last = blocks[:first], blocks[first:end], blocks[end:]
        self.threshold, self.warm_up = threshold, warm_up
        self.seen: Tensor | None = None
        self.residual = torch.zeros(())
        self.computed: list[bool] = []

    def forward(self, hidden: Tensor, *given: Tensor) -> Tensor:
        begun = hidden
        for block in self.first:
            hidden = block(hidden, *given)
        seen = hidden - begun
        near = self.seen is not None and len(self.computed) >= self.warm_up
        if near:
            near = bool((seen - self.seen).abs().mean() / self.seen.abs().mean() < self.threshold)
        self.computed.append(not near)
        if not near:
            before = hidden
            for block in self.middle:
                hidden = block(hidden, *given)
            self.seen, self.residual = seen, hidden - before
        else:
            hidden = hidden + self.residual
        for block in self.last:
            hidden = block(hidden, *given)
        return hidden


def given(bundle: Bundle, seed: int) -> tuple[Tensor, Tensor]:
    """Return latents and states of one prompt."""
    generator = torch.Generator().manual_seed(seed)
    channels = bundle.manifest.inputs["latents"].shape[1]
    width = bundle.manifest.inputs["text_states"].shape[-1]
    latents = torch.randn(1, int(channels), 2, 8, 12, generator=generator)
    return latents, torch.randn(1, 6, int(width), generator=generator)


def session_run(
    session: Session, setting: CacheSetting, seed: int = 0
) -> tuple[list[Tensor], list[bool | None]]:
    """Run an Euler loop; return every model output and which steps were computed."""
    latents, states = given(session.model.bundle, seed)
    session.set_prompt("cond", {"text_states": states})
    session.begin(STEPS, setting)
    outputs = []
    for step in range(len(STEPS)):
        outputs.append(session.step("cond", step, {"latents": latents}).clone())
        latents = latents - outputs[-1] / len(STEPS)
    return outputs, session.statistics.branches["cond"].computed


def dbcache(first: int, last: int, threshold: float, warm_up: int = 2) -> CacheSetting:
    return CacheSetting(
        policy="dbcache",
        parameters={"first_blocks": first, "last_blocks": last, "threshold": threshold},
        guard=GuardSetting(first_exact=warm_up),
    )


@pytest.fixture(scope="module")
def bundle(repository: Path, build_bundle: Callable[..., Bundle]) -> Bundle:
    """The demo model: eight blocks."""
    policies = ["dbcache", "firstblock", "taylorseer", "dbcache+taylorseer"]
    return build_bundle(repository / "models" / "shapes_wan", ("openvino",), policies=policies)


@pytest.mark.parametrize(
    ("first", "last", "threshold"), [(2, 2, 0.2), (1, 0, 0.2), (1, 6, 0.2), (5, 1, 0.2)]
)
def test_steps_equal_the_transcription_over_diffusers_blocks(
    repository: Path, bundle: Bundle, first: int, last: int, threshold: float
) -> None:
    session = Session(Model(bundle, "openvino"))
    outputs, computed = session_run(session, dbcache(first, last, threshold))
    folder = repository / "models" / "shapes_wan" / "transformer"
    eager = WanTransformer3DModel.from_pretrained(folder).eval()
    plain = PlainDBCache(eager.blocks, first, last, threshold, warm_up=2)
    eager.blocks = nn.ModuleList([plain])
    latents, states = given(bundle, 0)
    for step, found in enumerate(outputs):
        with torch.no_grad():
            timestep = STEPS[step].expand(1)
            expected = eager(latents, timestep, states, return_dict=False)[0]
        error = (found - expected).abs().mean() / expected.abs().mean()
        assert error < TOLERANCE, f"step {step}"
        latents = latents - expected / len(STEPS)
    assert computed == plain.computed
    assert {True, False} == set(computed[2:]), "some of both"
    assert session.statistics.always_run == (first + last) / 8
    done, full = len(computed), sum(map(bool, computed))
    paid = full + (done - full) * (first + last) / 8
    assert session.statistics.ideal_speedup == pytest.approx(done / paid)


def test_one_first_block_is_first_block_cache(bundle: Bundle) -> None:
    session = Session(Model(bundle, "openvino"))
    found = session_run(session, dbcache(1, 0, 0.2, warm_up=1))
    setting = CacheSetting(policy="firstblock", parameters={"threshold": 0.2})
    expected = session_run(session, setting)
    assert found[1] == expected[1]
    assert all(torch.equal(a, b) for a, b in zip(found[0], expected[0], strict=True))


def test_all_blocks_together_give_the_same_however_they_are_divided(bundle: Bundle) -> None:
    """Never reusing equals no cache bit for bit, before, between and after other divisions."""
    session = Session(Model(bundle, "openvino"))
    exact = session_run(session, CacheSetting())[0]
    for first, last in ((1, 0), (2, 2), (1, 6), (6, 1), (2, 2)):
        outputs, computed = session_run(session, dbcache(first, last, 0.0))
        assert all(computed)
        assert all(torch.equal(a, b) for a, b in zip(exact, outputs, strict=True)), (first, last)
    assert all(
        torch.equal(a, b)
        for a, b in zip(exact, session_run(session, CacheSetting())[0], strict=True)
    )


def test_a_run_is_the_same_after_runs_that_divide_otherwise(bundle: Bundle) -> None:
    setting = dbcache(2, 2, 0.2)
    expected = session_run(Session(Model(bundle, "openvino")), setting)
    session = Session(Model(bundle, "openvino"))
    session_run(session, dbcache(1, 5, 0.3), seed=3)
    session_run(session, CacheSetting(policy="taylorseer"), seed=4)
    found = session_run(session, setting)
    assert found[1] == expected[1]
    assert all(torch.equal(a, b) for a, b in zip(found[0], expected[0], strict=True))


def test_the_ring_holds_what_the_blocks_between_add(bundle: Bundle) -> None:
    session = Session(Model(bundle, "openvino"))
    session_run(session, dbcache(2, 2, 0.0))
    branch = session._branches["cond"]
    (ring, body) = (branch.cache.ring, branch.body)
    residual = ring.history["hidden"][0]
    assert torch.equal(residual, body.after["hidden"] - body.before["hidden"])
    whole = body.results["hidden"] - session._shared["hidden"]
    assert not torch.allclose(residual, whole, rtol=1e-2)


def test_a_mix_is_of_the_blocks_between(bundle: Bundle) -> None:
    """Taylor's line through the last two middle residuals, and not the newest held."""
    session = Session(Model(bundle, "openvino"))
    given = dbcache(2, 2, 0.2)
    held = session_run(session, given)
    mixed = session_run(session, given.model_copy(update={"policy": "dbcache+taylorseer"}))
    assert len(next(m for m in session.statistics.branches["cond"].mix if m)) == 2
    assert not all(torch.equal(a, b) for a, b in zip(held[0], mixed[0], strict=True))


def test_offloaded_blocks_give_the_same(bundle: Bundle) -> None:
    setting = dbcache(2, 2, 0.2)
    expected = session_run(Session(Model(bundle, "openvino")), setting)
    offloaded = Model(bundle, "openvino", DeviceOptions(offload=True))
    found = session_run(Session(offloaded), setting)
    assert found[1] == expected[1]
    assert all(torch.equal(a, b) for a, b in zip(found[0], expected[0], strict=True))


@pytest.mark.parametrize(("first", "last"), [(8, 0), (4, 4), (1, 7), (9, 2)])
def test_a_request_that_leaves_no_block_to_cache_is_refused(
    bundle: Bundle, first: int, last: int
) -> None:
    session = Session(Model(bundle, "openvino"))
    with pytest.raises(
        ConfigError,
        match=f"^{first} first and {last} last blocks that always run: "
        "leave none of the model's 8 blocks to be cached; let at most 7 of them run",
    ):
        session.begin(STEPS, dbcache(first, last, 0.2))
    by_branch = dbcache(1, 0, 0.2).model_copy(update={"branches": {"uncond": {"first_blocks": 8}}})
    with pytest.raises(ConfigError, match="8 first and 0 last"):
        session.begin(STEPS, by_branch)


def test_a_config_that_leaves_no_block_to_cache_is_refused_by_build(
    repository: Path, tmp_path: Path
) -> None:
    file = tmp_path / "deep.json"
    file.write_text(
        '{"feature_caching": "DBCache", "Fn_compute_blocks": 6, "Bn_compute_blocks": 2}'
    )
    request = BuildRequest(
        model=str(repository / "models" / "shapes_wan"),
        out=tmp_path / "bundle",
        backends=[backend("onnxruntime")],
        configs=config_entries([str(file)], lambda text: None),
    )
    with pytest.raises(ConfigError, match=r"^config 'deep', 6 first and 2 last blocks that always"):
        plan(request)
