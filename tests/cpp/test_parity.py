"""C++ takes the decisions that Python takes and returns the same latents, bit for bit.

Both run the same compiled blobs with the same number of threads; what surrounds them is float32
arithmetic in one stated order, so nothing is left that could differ.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from freewheel.bundle.reader import Bundle
from freewheel.compiler.samplers import SamplerTable
from freewheel.configs.setting import CacheSetting, GuardSetting
from freewheel.runtime.model import LoadedModel
from freewheel.runtime.session import Session

pytestmark = [pytest.mark.openvino, pytest.mark.slow]

STEPS, GUIDANCE, SHIFT = 10, 3.0, 3.0
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
}  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    found = {
        "latents": random.standard_normal((1, 16, 5, 12, 12), dtype=np.float32),
        "cond": random.standard_normal((1, 24, 128), dtype=np.float32),
        "uncond": random.standard_normal((1, 24, 128), dtype=np.float32),
    }
    folder = tmp_path_factory.mktemp("inputs")
    save_file(
        {f"{b}.text_states": found[b] for b in ("cond", "uncond")}, folder / "prompts.safetensors"
    )
    np.save(folder / "latents.npy", found["latents"])
    return {**found, "folder": folder}


@pytest.fixture(scope="module")
def session(demo_bundle: Bundle) -> Session:
    return Session(LoadedModel(demo_bundle, "openvino"))


def table_of(bundle: Bundle, name: str) -> SamplerTable:
    entry = next(s for s in bundle.manifest.samplers if s.name == name and s.flow_shift == SHIFT)
    packed = load_file(bundle.path(entry.file))[str(STEPS)]
    return SamplerTable(packed[:, 0], packed[:, 1], packed[:, 2:])


def run_python(session: Session, table: SamplerTable, setting: CacheSetting, inputs):
    session.begin(torch.from_numpy(table.timesteps.astype(np.float32)), setting)
    for branch in ("cond", "uncond"):
        session.set_prompt(branch, {"text_states": torch.from_numpy(inputs[branch])})
    samples, outputs = [inputs["latents"]], []
    for step in range(STEPS):
        given = {"latents": torch.from_numpy(samples[0])}
        cond = session.step("cond", step, given).clone()
        uncond = session.step("uncond", step, given).clone()
        outputs.insert(0, (uncond + GUIDANCE * (cond - uncond)).numpy())
        samples.insert(0, table.advance(step, samples, outputs))
    return samples[0], session.statistics.as_dict()


def run_cpp(build: Path, bundle: Bundle, setting: CacheSetting, sampler: str, inputs, out: Path):
    overrides = {**setting.parameters}
    overrides |= {f"guard.{n}": v for n, v in setting.guard.model_dump().items() if v != []}
    if setting.signal is not None:
        overrides["signal"] = setting.signal
    command = [
        build / "freewheel-run", bundle.folder, "--out", out, "--cache", setting.policy,
        "--embeddings", inputs["folder"] / "prompts.safetensors",
        "--latents", inputs["folder"] / "latents.npy", "--steps", STEPS, "--guidance", GUIDANCE,
        "--shift", SHIFT, "--sampler", sampler, "--threads", torch.get_num_threads(),
        "--backend", "openvino", "--json", "--quiet",
        *(p for n, v in overrides.items() for p in ("--set", f"{n}={json.dumps(v)}")),
    ]  # fmt: skip
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return load_file(out)["latents"], json.loads(done.stdout)


@pytest.mark.parametrize("sampler", ["unipc", "euler"])
@pytest.mark.parametrize("name", SETTINGS)
def test_decisions_and_latents_are_equal(
    name, sampler, cpp_build, demo_bundle, session, inputs, tmp_path
):
    setting = SETTINGS[name]
    expected, python = run_python(session, table_of(demo_bundle, sampler), setting, inputs)
    found, cpp = run_cpp(
        cpp_build, demo_bundle, setting, sampler, inputs, tmp_path / "out.safetensors"
    )
    for branch in ("cond", "uncond"):
        for what in ("computed", "distance", "mix"):
            assert cpp["branches"][branch][what] == python["branches"][branch][what], what
    assert cpp["folded"] == python["folded"]
    assert np.array_equal(found, expected)


def test_every_policy_of_the_bundle_is_compared(demo_bundle):
    compared = {s.policy for s in SETTINGS.values()}
    assert compared >= {"off", "teacache", "taylorseer", "adacache", "custom"}


def test_cpp_draws_the_noise_that_pytorch_draws(cpp_build, demo_bundle, inputs, tmp_path):
    """The seed's noise, read back as the latents of a run without a single model output."""
    out = tmp_path / "noise.npy"
    command = [
        cpp_build / "freewheel-run", demo_bundle.folder, "--out", out, "--seed", 42, "--steps", 30,
        "--frames", 17, "--height", 96, "--width", 96, "--cache", "off", "--shift", SHIFT,
        "--embeddings", inputs["folder"] / "prompts.safetensors", "--json", "--quiet",
        "--set", "guard.first_exact=0", "--sampler", "euler", "--guidance", 1,
    ]  # fmt: skip
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    generator = torch.Generator().manual_seed(42)
    noise = torch.randn((1, 16, 5, 12, 12), generator=generator)
    np.save(tmp_path / "noise_in.npy", noise.numpy())
    again = [str(c) for c in command]
    again[again.index(str(out))] = str(tmp_path / "again.npy")
    done = subprocess.run(
        [*again, "--latents", str(tmp_path / "noise_in.npy")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    # The vectorised logarithm of PyTorch rounds otherwise than the C library's.
    np.testing.assert_allclose(np.load(out), np.load(tmp_path / "again.npy"), atol=2e-3)
