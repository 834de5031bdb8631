"""C++ takes the decisions that Python takes and returns the same latents, bit for bit.

Both run the same compiled blobs with the same number of threads; what surrounds them is float32
arithmetic in one stated order, so nothing is left that could differ.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from loop import Loop, check_equal, crossed
from safetensors.numpy import save_file

from freewheel.bundle.reader import Bundle
from freewheel.policies.setting import CacheSetting, GuardSetting
from freewheel.runtime.session import Session
from freewheel.runtime.settings import config_entries

pytestmark = [pytest.mark.openvino, pytest.mark.slow]

STEPS, GUIDANCE, SHIFT = 10, 3.0, 3.0
BRANCHES = ("cond", "uncond")
FRONTIER = ([1, 0, 1, 0, 0], [1, 1, 0, 1, 0], [1, 1, 1, 0, 1])
SETTINGS = {
    "off": CacheSetting(),
    "teacache": CacheSetting(policy="teacache", parameters={"threshold": 0.3}),
    "teacache-first-window": CacheSetting(
        policy="teacache", signal="timestep_proj", parameters={"threshold": 0.3},
        guard=GuardSetting(first_exact=3, last_exact=1),
    ),
    "teacache-modulated": CacheSetting(
        policy="teacache", signal="modulated_input", parameters={"threshold": 0.3}
    ),
    "teacache-limited": CacheSetting(
        policy="teacache", parameters={"threshold": 5.0, "coefficients": [2.0, 1.0, 0.0]},
        guard=GuardSetting(max_consecutive=2, max_reused=5, exact_steps=[4]),
    ),
    "taylorseer": CacheSetting(policy="taylorseer", parameters={"interval": 3}),
    "taylorseer-second-order": CacheSetting(
        policy="taylorseer", parameters={"interval": 3, "order": 2, "variant": "newton"}
    ),
    "adacache": CacheSetting(policy="adacache"),
    "adacache-slow": CacheSetting(
        policy="adacache",
        parameters={"codebook_thresholds": [0.08, 0.16, 1.0], "codebook_skips": [3, 2, 1]},
    ),
    "custom": CacheSetting(policy="custom", parameters={"threshold": 0.3}),
    "easycache": CacheSetting(policy="easycache", parameters={"threshold": 0.1}),
    "firstblock": CacheSetting(policy="firstblock", parameters={"threshold": 0.2}),
    "magcache": CacheSetting(
        policy="magcache", parameters={"threshold": 0.2, "steps": 10, "ratios": [1.0, 0.97, 0.95]}
    ),
    "solved": CacheSetting(
        policy="solved",
        parameters={
            "computed_steps": 3, "steps": 5, "budgets": [2, 3, 4],
            "computed": [m for row in FRONTIER for m in (*row, *[0] * (200 - len(row)))],
            "mix": [1.0, 0.0, *[1.5, -0.5] * 5], "history": 2,
        },
    ),
    "spectrum": CacheSetting(
        policy="spectrum", parameters={"warmup": 2, "clock": "sigma", "blend": 0.7, "history": 4}
    ),
    "hermite": CacheSetting(policy="hermite", parameters={"interval": 3}),
    "foca": CacheSetting(policy="foca", parameters={"interval": 4, "history": 3}),
    "dmd": CacheSetting(policy="dmd", parameters={"interval": 2}),
    "sencache": CacheSetting(
        policy="sencache", parameters={"threshold": 0.5, "early": 0.1, "timesteps": [1000.0, 500.0],
        "latent_sensitivity": [1.0, 0.5]}
    ),
    "dicache": CacheSetting(
        policy="dicache", parameters={"threshold": 0.6, "retention": 0.1, "farthest_gain": 2.0}
    ),
    "dicache-projection": CacheSetting(
        policy="dicache",
        parameters={"threshold": 0.6, "retention": 0.1, "measure": "projection"},
    ),
    "spectrum-dicache": CacheSetting(policy="spectrum+dicache", parameters={"warmup": 2}),
    "seacache": CacheSetting(
        policy="seacache", parameters={"threshold": 0.4}, guard=GuardSetting(max_consecutive=2)
    ),
    "teacache-spectrum": CacheSetting(
        policy="teacache+spectrum", parameters={"threshold": 0.3, "degree": 3, "clock": "sigma"}
    ),
    "dbcache": CacheSetting(
        policy="dbcache", parameters={"threshold": 0.3, "first_blocks": 2, "last_blocks": 2},
        guard=GuardSetting(first_exact=2),
    ),
    "dualblock": CacheSetting(
        policy="dualblock",
        parameters={"threshold": 0.3, "first_blocks": 2, "last_blocks": 2, "channel_stride": 2},
    ),
    "dbcache-taylorseer": CacheSetting(
        policy="dbcache+taylorseer",
        parameters={"threshold": 0.3, "first_blocks": 1, "last_blocks": 5, "order": 2},
    ),
    "firstblock-dmd": CacheSetting(policy="firstblock+dmd", parameters={"threshold": 0.3}),
    "adacache-foca": CacheSetting(policy="adacache+foca", parameters={"history": 3}),
}  # fmt: skip


CONFIGS = ("shapes_wan_magcache", "shapes_wan_solved")
"""Of the bundle, with tables of their own for each branch."""


@pytest.fixture(scope="module")
def bundle(repository: Path, build_bundle: Callable[..., Bundle]) -> Bundle:
    """A bundle of the demo model with `CONFIGS`, and with the pairs of `SETTINGS`."""
    pairs = [s.policy for s in SETTINGS.values() if "+" in s.policy]
    entries = config_entries(["shapes_wan_teacache", *CONFIGS, *pairs], lambda text: None)
    return build_bundle(repository / "models" / "shapes_wan", ("openvino",), configs=entries)


@pytest.fixture(scope="module")
def loops(bundle: Bundle) -> dict[str, Loop]:
    """A loop per sampler, of one pair of sessions."""
    random = np.random.default_rng(0)
    latents = random.standard_normal((1, 16, 5, 12, 12), dtype=np.float32)
    states = {b: random.standard_normal((1, 24, 128), dtype=np.float32) for b in BRANCHES}
    prompts = {b: {"text_states": s} for b, s in states.items()}
    sessions: list[Session] = []
    return {
        s: Loop(bundle, latents, prompts, STEPS, SHIFT, s, (GUIDANCE,), sessions)
        for s in ("unipc", "euler")
    }


@pytest.mark.parametrize("sampler", ["unipc", pytest.param("euler", marks=pytest.mark.nightly)])
@pytest.mark.parametrize("name", SETTINGS)
def test_decisions_and_latents_are_equal(
    name: str, sampler: str, cpp_build: Path, loops: dict[str, Loop], tmp_path: Path
) -> None:
    check_equal(loops[sampler], cpp_build, SETTINGS[name], tmp_path)


def test_the_other_sampler_is_equal(
    cpp_build: Path, loops: dict[str, Loop], tmp_path: Path
) -> None:
    """A sampler is a table of the bundle: nothing that a policy could change."""
    check_equal(loops["euler"], cpp_build, SETTINGS["teacache"], tmp_path)


@pytest.mark.parametrize("name", CONFIGS)
def test_branches_with_tables_of_their_own_are_equal(
    name: str, cpp_build: Path, bundle: Bundle, loops: dict[str, Loop], tmp_path: Path
) -> None:
    setting = bundle.manifest.configs[name].cache
    assert setting.branches.keys() == {"cond", "uncond"}
    made_for = replace(loops["unipc"], steps=30)
    report = check_equal(made_for, cpp_build, setting, tmp_path, config=name)
    assert 0 < report["computed_steps"] < 30
    assert report["branches"]["cond"]["mix"] != report["branches"]["uncond"]["mix"] or (
        setting.policy == "magcache"
    ), "solved mixes differ between branches"


@pytest.mark.parametrize("precision", crossed(["bfloat16", "float16"], ["bfloat16"]))
def test_a_body_of_low_precision_gives_the_same(
    precision: str,
    cpp_build: Path,
    tiny_checkpoint: Path,
    build_bundle: Callable[..., Bundle],
    tmp_path: Path,
) -> None:
    bundle = build_bundle(tiny_checkpoint, ("openvino",), precision=precision)
    inputs = bundle.manifest.inputs
    random = np.random.default_rng(0)
    shape = (1, int(inputs["latents"].shape[1]), 2, 6, 8)
    states = random.standard_normal((1, 5, int(inputs["text_states"].shape[-1])), dtype=np.float32)
    loop = Loop(
        bundle,
        random.standard_normal(shape, dtype=np.float32),
        {"cond": {"text_states": states}},
        STEPS,
        bundle.manifest.samplers[0].flow_shift,
    )
    for name in ("off", "taylorseer", "adacache", "solved"):
        report = check_equal(loop, cpp_build, SETTINGS[name], tmp_path)
        assert (report["computed_steps"] < STEPS) == (name != "off"), name


def test_every_policy_of_the_bundle_is_compared(bundle: Bundle) -> None:
    compared = {s.policy for s in SETTINGS.values()}
    compared |= {bundle.manifest.configs[n].cache.policy for n in CONFIGS}
    assert compared == set(bundle.manifest.policies)


def test_cpp_draws_the_noise_that_pytorch_draws(
    cpp_build: Path, bundle: Bundle, tmp_path: Path
) -> None:
    """The seed's noise, seen through one step from it and one from what PyTorch draws."""
    prompts = tmp_path / "prompts.safetensors"
    save_file({"cond.text_states": np.full((1, 24, 128), 0.1, np.float32)}, prompts)
    noise = torch.randn((1, 16, 5, 12, 12), generator=torch.Generator().manual_seed(42))
    np.save(tmp_path / "noise.npy", noise.numpy())

    def run(name: str, *arguments: object) -> np.ndarray:
        command = [
            cpp_build / "freewheel-run", bundle.folder, "--out", tmp_path / name, "--steps", 1,
            "--cache", "off", "--shift", SHIFT, "--embeddings", prompts, "--quiet",
            "--sampler", "euler", "--guidance", 1, *arguments,
        ]  # fmt: skip
        done = subprocess.run(
            [str(c) for c in command], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return np.load(tmp_path / name)

    size = ("--frames", 17, "--height", 96, "--width", 96)
    drawn = run("drawn.npy", "--seed", 42, *size)
    given = run("given.npy", "--latents", tmp_path / "noise.npy")
    other = run("other.npy", "--seed", 43, *size)
    # The vectorised logarithm of PyTorch rounds otherwise than the C library's.
    np.testing.assert_allclose(drawn, given, atol=1e-4)
    assert np.abs(other - given).max() > 1
