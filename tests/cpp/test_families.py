"""C++ runs a bundle of each family unchanged: Python's decisions and latents, bit for bit.

The library knows no family: a bundle's manifest says everything. Models are the tiny random ones of
the families' own tests.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_flux as flux
import test_hunyuan as hunyuan
import test_ltx as ltx
import test_wan_experts as wan
import torch
from cases import case
from loop import BY_CONTENT, Loop, are_equal, check_equal, check_offload, crossed
from test_bundles import inputs_at

from freewheel.bundle.reader import Bundle
from freewheel.compiler.cut.row import SIZES
from freewheel.policies import POLICIES
from freewheel.policies.setting import CacheSetting, GuardSetting

pytestmark = [pytest.mark.openvino, pytest.mark.slow]

STEPS = 6
FAMILIES = {"flux": flux, "hunyuan": hunyuan, "ltx": ltx}


FOUND = ("qwen_image", "sd35", "flux_2", "wan_vace", "chroma")
"""Models whose cut is found: several graphs of the prompt, masks, three kinds of blocks, streams that a
block begins, skip connections, a table for each block."""

COVERING = ("hunyuan", "sd35", "wan_vace", "chroma")
"""Models that have between them every word of a bundle that a C++ run reads."""


@pytest.fixture(scope="module", params=crossed([*FAMILIES, *FOUND], COVERING))
def loop(
    request: pytest.FixtureRequest,
    asked_policies: list[str] | None,
    build_bundle: Callable[..., Bundle],
    tmp_path_factory: pytest.TempPathFactory,
) -> Loop:
    """A loop of one branch over a batch of two, at the family's second size."""
    folder = tmp_path_factory.mktemp(request.param) / "model"
    if request.param in FOUND:
        one = case(request.param)
        one.model.save_pretrained(folder)
        bundle = build_bundle(folder, ("openvino",), policies=asked_policies)
        inputs, _ = inputs_at(one, bundle, SIZES)
    else:
        family = FAMILIES[request.param]
        family.model_of(family.TINY).save_pretrained(folder)
        bundle = build_bundle(folder, ("openvino",), policies=asked_policies)
        inputs = family.inputs_of(family.TINY, family.SIZES[1])
    declared = bundle.manifest.inputs
    prompt = {n: inputs[n].numpy() for n, i in declared.items() if i.runs == "prompt"}
    return Loop(bundle, inputs["latents"].numpy(), {"cond": prompt}, STEPS, 1.0)


@pytest.mark.parametrize("policy", crossed(POLICIES, ["off"]))
def test_a_bundle_of_each_family_runs_unchanged(
    policy: str, loop: Loop, cpp_build: Path, tmp_path: Path
) -> None:
    """Each policy is compared on the demo model; here each model, and by content below."""
    if policy not in loop.bundle.manifest.policies:
        pytest.skip("the model gives it nothing to look at")
    setting = CacheSetting(policy=policy, guard=GuardSetting(first_exact=1, last_exact=1))
    report = check_equal(loop, cpp_build, setting, tmp_path)
    assert report["branches"]["cond"]["computed"][0]


def test_offloaded_weights_give_the_same(loop: Loop, cpp_build: Path, tmp_path: Path) -> None:
    check_offload(loop, cpp_build, tmp_path)


def test_decisions_by_content_are_equal(loop: Loop, cpp_build: Path, tmp_path: Path) -> None:
    report = check_equal(loop, cpp_build, BY_CONTENT, tmp_path)
    assert not report["folded"]
    assert report["branches"]["cond"]["computed"] == [True, False, True, False, True, True]


@pytest.fixture(scope="module", params=crossed(wan.FORMS, ["linked"]))
def experts(
    request: pytest.FixtureRequest,
    asked_policies: list[str] | None,
    build_bundle: Callable[..., Bundle],
    tmp_path_factory: pytest.TempPathFactory,
) -> Loop:
    """Two experts with guidance, each with a scale of its own; UniPC looks back over the switch."""
    folder = tmp_path_factory.mktemp("wan22")
    checkpoint = wan.write_checkpoint(folder, request.param)
    bundle = build_bundle(checkpoint, ("openvino",), policies=asked_policies)
    random = np.random.default_rng(0)
    latents = random.standard_normal((1, 16, 2, 4, 6), dtype=np.float32)
    prompts = {
        b: {"text_states": random.standard_normal((1, 7, 12), dtype=np.float32)}
        for b in ("cond", "uncond")
    }
    return Loop(bundle, latents, prompts, 11, 5.0, "unipc", (3.0, 2.0))


@pytest.mark.parametrize(
    "policy", crossed([*POLICIES, "by content"], ["off", "by content", "taylorseer"])
)
def test_two_experts_are_switched_as_python_switches_them(
    policy: str, experts: Loop, cpp_build: Path, tmp_path: Path
) -> None:
    setting = BY_CONTENT if policy == "by content" else CacheSetting(policy=policy)
    report = check_equal(experts, cpp_build, setting, tmp_path)
    high = int((torch.from_numpy(experts.table().timesteps) >= 875).sum())
    assert 2 < high < experts.steps - 2
    for branch in report["branches"].values():
        assert len(branch["computed"]) == experts.steps
        assert branch["computed"][0]
        assert branch["computed"][high], "the second expert begins with a computed step"


def test_each_experts_weights_are_offloaded(experts: Loop, cpp_build: Path, tmp_path: Path) -> None:
    check_offload(experts, cpp_build, tmp_path)


def test_an_expert_alone_is_what_a_bundle_of_it_is(
    experts: Loop, cpp_build: Path, linked_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    """Both ways round: a loop that never switches, by moving the boundary past either end."""
    found: list[Any] = []
    for boundary in (0.0, 2000.0):

        def move(manifest: dict[str, Any], boundary: float = boundary) -> None:
            manifest["experts"][0]["from_timestep"] = boundary
            manifest["experts"][1]["from_timestep"] = -1.0

        moved = Loop(
            Bundle(linked_bundle(experts.bundle, move)),
            experts.latents,
            experts.prompts,
            experts.steps,
            experts.shift,
            experts.sampler,
            (3.0,),
        )
        latents, report = moved.in_cpp(cpp_build, CacheSetting(), tmp_path)
        assert report["steps"] == experts.steps
        found.append(latents)
    both, _ = experts.in_cpp(cpp_build, CacheSetting(), tmp_path)
    assert not are_equal(found[0], found[1])
    assert not are_equal(both, found[0])
    assert not are_equal(both, found[1])
