"""From token ids to frames in one process without Python, on the demo model."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from safetensors.numpy import load_file
from transformers import AutoTokenizer

from freewheel.bundle.reader import Bundle
from freewheel.runtime.pipeline.attach import attach

pytestmark = [pytest.mark.openvino, pytest.mark.slow]

PROMPT = "a red circle moving right on a gray background"
STEPS, GUIDANCE = 8, 3.0
SHAPE = (1, 16, 5, 12, 12)
"""Of 17 frames of 96 x 96, the size that the first config names."""


@pytest.fixture(scope="module")
def arguments(whole_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of a run from token ids and given noise."""
    tokenizer = AutoTokenizer.from_pretrained(whole_bundle.path("pipeline/tokenizer"))
    ids = [",".join(str(i) for i in tokenizer(text).input_ids) for text in (PROMPT, "")]
    noise = tmp_path_factory.mktemp("noise") / "noise.npy"
    generator = torch.Generator().manual_seed(7)
    np.save(noise, torch.randn(SHAPE, generator=generator).numpy())
    return [
        "--token-ids", ids[0], "--negative-token-ids", ids[1], "--latents", str(noise), "--cache", "off",
        "--steps", str(STEPS), "--guidance", str(GUIDANCE), "--json", "--quiet",
    ]  # fmt: skip


def freewheel_run(
    build: Path, bundle: Bundle, out: Path, arguments: list[str]
) -> dict[str, object]:
    """Run with an empty environment, so that no Python could be found."""
    command = [str(build / "freewheel-run"), str(bundle.folder), "--out", str(out), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={})
    report: dict[str, object] = json.loads(done.stdout)
    assert (done.returncode == 0) == ("error" not in report), done.stdout + done.stderr
    return report


def frames_of(folder: Path) -> np.ndarray:
    return np.stack([iio.imread(p) for p in sorted(folder.glob("*.png"))])


def test_frames_are_the_python_pipelines(
    cpp_build: Path, whole_bundle: Bundle, arguments: list[str], tmp_path: Path
) -> None:
    freewheel_run(cpp_build, whole_bundle, tmp_path / "png", arguments)
    found = frames_of(tmp_path / "png")
    assert found.shape == (17, 96, 96, 3)
    pipe = WanPipeline.from_pretrained(whole_bundle.path("pipeline"), transformer=None)
    attach(pipe, whole_bundle, "off")
    pipe.set_progress_bar_config(disable=True)
    noise = torch.from_numpy(np.load(arguments[arguments.index("--latents") + 1]))
    expected = pipe(
        PROMPT, negative_prompt="", height=96, width=96, num_frames=17, num_inference_steps=STEPS,
        guidance_scale=GUIDANCE, max_sequence_length=16, output_type="np", latents=noise,
    ).frames[0]  # fmt: skip
    # The scheduler's own float32 arithmetic: one level of 255 where a value lies at a half.
    assert np.abs(found - np.rint(expected * 255)).max() <= 1
    middle = found[8].astype(int)
    is_red = (middle[..., 0] > middle[..., 1] + 60) & (middle[..., 0] > middle[..., 2] + 60)
    assert 100 < is_red.sum() < 4000, "a red thing on something that is not"


def test_raw_frames_are_the_pictures_bytes(
    cpp_build: Path, whole_bundle: Bundle, arguments: list[str], tmp_path: Path
) -> None:
    few = [*arguments]
    few[few.index("--steps") + 1] = "2"
    freewheel_run(cpp_build, whole_bundle, tmp_path / "png", few)
    freewheel_run(cpp_build, whole_bundle, tmp_path / "video.rgb", few)
    raw = np.frombuffer((tmp_path / "video.rgb").read_bytes(), np.uint8)
    assert np.array_equal(raw.reshape(17, 96, 96, 3), frames_of(tmp_path / "png"))
    freewheel_run(cpp_build, whole_bundle, tmp_path / "x.safetensors", few)
    assert load_file(tmp_path / "x.safetensors")["latents"].shape == SHAPE


def test_what_the_ends_can_not_do_is_said(
    cpp_build: Path, whole_bundle: Bundle, demo_bundle: Bundle, arguments: list[str], tmp_path: Path
) -> None:
    def fault(bundle: Bundle, out: str, *changed: str) -> str:
        given = [*arguments]
        for flag, value in zip(changed[::2], changed[1::2], strict=True):
            given[given.index(flag) + 1] = value
        error = freewheel_run(cpp_build, bundle, tmp_path / out, given)["error"]
        assert isinstance(error, dict)
        assert error["where"]
        assert error["hint"]
        return f"{error['message']}; {error['hint']}"

    assert "--with-text-encoder" in fault(demo_bundle, "x.npy")
    long = ",".join(["5"] * 17)
    assert "are 17, expected 1 to 16" in fault(whole_bundle, "x.npy", "--token-ids", long)
    assert "'x' is no number" in fault(whole_bundle, "x.npy", "--token-ids", "5,x")
    for flag in ("--token-ids", "--negative-token-ids"):
        for stray in (-5, 128, 99999):
            said = fault(whole_bundle, "x.npy", flag, f"5,{stray},1")
            assert f"token ids: hold {stray}, expected 0 to 127" in said
    small = tmp_path / "small.npy"
    np.save(small, np.zeros((1, 16, 1, 4, 4), np.float32))
    said = fault(whole_bundle, "frames", "--latents", str(small))
    assert "latents are [1, 16, 1, 4, 4], it was compiled for [1, 16, 5, 12, 12]" in said
    assert not (tmp_path / "x.npy").exists()
    assert not (tmp_path / "frames").exists()


def test_no_python_is_in_the_process(cpp_build: Path) -> None:
    loaded = subprocess.run(
        ["ldd", str(cpp_build / "freewheel-run")], capture_output=True, text=True, check=True
    )
    assert "openvino" in loaded.stdout
    assert "libpython" not in loaded.stdout
