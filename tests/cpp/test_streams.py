"""C++ runs models that sample several things at once, or are given several timesteps, as Python does.

LTX-2 makes a video and its sound, MiniMax-H3 does so over two schedules, AnyFlow is told the next
step's timestep beside its own. Models are the tiny random ones of the cutter's tests.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import case
from loop import BY_CONTENT, Loop, are_equal, check_equal, check_offload, crossed
from safetensors.numpy import load_file, save_file
from several import loop_of, save

from freewheel.bundle.reader import Bundle
from freewheel.policies import POLICIES
from freewheel.policies.setting import CacheSetting, GuardSetting

pytestmark = [pytest.mark.openvino, pytest.mark.slow]

MODELS = ("any_flow", "ltx_2", "ltx_2_3", "minimax_h3")
SEVERAL = ("ltx_2", "ltx_2_3", "minimax_h3")
COVERING = ("any_flow", "ltx_2", "minimax_h3")


@pytest.fixture(scope="module", params=crossed(MODELS, COVERING))
def loop(
    request: pytest.FixtureRequest,
    asked_policies: list[str] | None,
    build_bundle: Callable[..., Bundle],
    tmp_path_factory: pytest.TempPathFactory,
) -> Loop:
    one = case(request.param)
    folder = tmp_path_factory.mktemp(request.param) / "model"
    save(one, folder)
    bundle = build_bundle(folder, ("openvino",), policies=asked_policies)
    return loop_of(one, bundle)


def test_the_models_are_of_these_kinds(loop: Loop) -> None:
    manifest = loop.bundle.manifest
    timesteps = [of for i in manifest.inputs.values() if i.runs == "run" for of in i.of]
    assert len(timesteps) > 1 or loop.beside
    if manifest.family == "minimax_h3":
        assert (loop.sampler, loop.shift) == ("MiniMaxH3Scheduler", 12.0)
        assert (loop.table().timesteps[1:] < loop.table("audio_latents").timesteps[1:]).all()


@pytest.mark.parametrize("policy", crossed(POLICIES, ["off", "firstblock", "taylorseer"]))
def test_decisions_and_samples_are_equal(
    policy: str, loop: Loop, cpp_build: Path, tmp_path: Path
) -> None:
    if policy not in loop.bundle.manifest.policies:
        pytest.skip("the model gives it nothing to look at")
    setting = CacheSetting(policy=policy, guard=GuardSetting(first_exact=1, last_exact=1))
    report = check_equal(loop, cpp_build, setting, tmp_path)
    assert report["branches"]["cond"]["computed"][0]


def test_decisions_by_content_are_equal(loop: Loop, cpp_build: Path, tmp_path: Path) -> None:
    report = check_equal(loop, cpp_build, BY_CONTENT, tmp_path)
    assert report["branches"]["cond"]["computed"] == [True, False, True, False, True, True]


def test_the_c_abi_gives_the_same(loop: Loop, cpp_build: Path, tmp_path: Path) -> None:
    """All that it takes is float32: indices and masks too."""
    setting = CacheSetting(policy=BY_CONTENT.policy)
    expected, _ = loop.in_cpp(cpp_build, setting, tmp_path, config=setting.policy)
    file = tmp_path / "prompts.safetensors"
    save_file({name: value.astype(np.float32) for name, value in load_file(file).items()}, file)
    scales = [f"{name}={scale}" for name, scale in loop.guidance_of.items()]
    command = [
        cpp_build / "tests" / "abi_run",
        loop.bundle.folder,
        torch.get_num_threads(),
        file,
        tmp_path / "latents.safetensors",
        tmp_path / "abi.safetensors",
        setting.policy,
        loop.steps,
        loop.guidance[0],
        *scales,
    ]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert are_equal(load_file(tmp_path / "abi.safetensors"), expected)


def test_a_file_of_one_tensor_is_refused_before_the_run(
    loop: Loop, cpp_build: Path, tmp_path: Path
) -> None:
    if not loop.beside:
        pytest.skip("it samples one thing")
    command = [cpp_build / "freewheel-run", loop.bundle.folder, "--out", tmp_path / "one.npy"]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert "the bundle samples latents, audio_latents at once; name a .safetensors" in done.stderr


def test_offloaded_weights_give_the_same(loop: Loop, cpp_build: Path, tmp_path: Path) -> None:
    check_offload(loop, cpp_build, tmp_path)
