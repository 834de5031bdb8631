"""From a prompt to a video in one process without Python, on the demo model."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
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
        PROMPT,
        negative_prompt="",
        height=96,
        width=96,
        num_frames=17,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        max_sequence_length=16,
        output_type="np",
        latents=noise,
    ).frames[0]
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


def test_the_summary_tells_of_the_whole_run(
    cpp_build: Path, whole_bundle: Bundle, arguments: list[str], tmp_path: Path
) -> None:
    few = [*arguments]
    few[few.index("--steps") + 1] = "2"
    report = freewheel_run(cpp_build, whole_bundle, tmp_path / "json.rgb", few)
    phases = report["phase_seconds"]
    assert set(phases) == {"load", "encode", "denoise", "decode"}
    assert report["total_seconds"] == pytest.approx(sum(phases.values()))
    assert report["steps_per_second"] == pytest.approx(2 / phases["denoise"])
    assert report["peak_memory_bytes"] > 32 << 20
    assert (report["backend"], report["computed_steps"]) == ("openvino", 2)
    assert isinstance(report["computed_steps"], int)
    told = [a for a in few if a not in ("--json", "--quiet")]
    command = [cpp_build / "freewheel-run", whole_bundle.folder, "--out", tmp_path / "told.rgb"]
    done = subprocess.run([*command, *told], capture_output=True, text=True, check=True, env={})
    last = done.stderr.splitlines()[-1]
    number = r"\d+\.\d\d"
    seconds = ", ".join(
        f"{phase} {number} s" for phase in ("load", "encode", "denoise", "decode", "total")
    )
    assert re.fullmatch(
        rf"whole run on openvino: {seconds}; {number} steps/s; peak memory {number} GiB", last
    ), last


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


def run_text(build: Path, bundle: Bundle, out: Path, *arguments: str, **env: str) -> dict:
    command = [str(build / "freewheel-run"), str(bundle.folder), "--out", str(out)]
    command += ["--cache", "off", "--steps", "2", "--guidance", "3", "--json", "--quiet"]
    done = subprocess.run(
        [*command, *arguments], capture_output=True, text=True, check=False, env=env
    )
    return {"rc": done.returncode, "said": done.stderr, **json.loads(done.stdout)}


def test_text_is_its_token_ids(
    cpp_build: Path, whole_bundle: Bundle, arguments: list[str], tmp_path: Path
) -> None:
    ids = arguments[1]
    negative = arguments[3]
    by_ids = run_text(
        cpp_build,
        whole_bundle,
        tmp_path / "ids.npy",
        "--token-ids",
        ids,
        "--negative-token-ids",
        negative,
    )
    by_text = run_text(cpp_build, whole_bundle, tmp_path / "text.npy", "--prompt", f"  {PROMPT}\n")
    assert (by_ids["rc"], by_text["rc"]) == (0, 0), by_text
    assert np.array_equal(np.load(tmp_path / "ids.npy"), np.load(tmp_path / "text.npy"))
    other = run_text(
        cpp_build,
        whole_bundle,
        tmp_path / "other.npy",
        "--prompt",
        PROMPT,
        "--negative-prompt",
        "a blue square",
    )
    assert other["rc"] == 0, other
    assert not np.array_equal(np.load(tmp_path / "other.npy"), np.load(tmp_path / "text.npy"))


def test_text_that_can_not_be_taken_is_refused(
    cpp_build: Path,
    whole_bundle: Bundle,
    demo_bundle: Bundle,
    tmp_path: Path,
    linked_bundle: Callable[..., Path],
) -> None:
    def fault(bundle: Bundle, *arguments: str, **env: str) -> str:
        answer = run_text(cpp_build, bundle, tmp_path / "x.npy", *arguments, **env)
        assert answer["rc"] in (3, 4)
        assert not (tmp_path / "x.npy").exists()
        return f"{answer['error']['message']}"

    assert "the bundle has no tokenizer; build it with --with-text-encoder" in fault(
        demo_bundle, "--prompt", PROMPT
    )
    assert "comes as text and as token ids" in fault(
        whole_bundle, "--prompt", PROMPT, "--token-ids", "5,1"
    )
    assert "are 31, expected 1 to 16" in fault(whole_bundle, "--prompt", "red " * 30)
    assert "is no UTF-8 text" in fault(whole_bundle, "--prompt", os.fsdecode(b"red \xff"))
    missing = fault(whole_bundle, "--prompt", PROMPT, FREEWHEEL_TOKENIZERS="/nowhere/lib.so")
    assert "set FREEWHEEL_TOKENIZERS to libopenvino_tokenizers.so" in missing

    def refuse_red(manifest: dict) -> None:
        manifest["tokenizer"]["unknown"] = int(manifest_ids["red"])

    tokenizer = AutoTokenizer.from_pretrained(whole_bundle.path("pipeline/tokenizer"))
    manifest_ids = tokenizer.get_vocab()
    strict = Bundle(linked_bundle(whole_bundle, refuse_red))
    assert "characters that the bundle's tokenizer graph does not know" in fault(
        strict, "--prompt", PROMPT
    )


def test_a_video_is_written_by_ffmpeg(
    cpp_build: Path, whole_bundle: Bundle, tmp_path: Path
) -> None:
    """The binary of imageio-ffmpeg, under the name that the PATH is searched for."""
    import imageio_ffmpeg

    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ffmpeg").symlink_to(imageio_ffmpeg.get_ffmpeg_exe())
    place = {"PATH": str(tmp_path / "bin")}
    video = tmp_path / "out" / "video.mp4"
    answer = run_text(
        cpp_build, whole_bundle, video, "--prompt", PROMPT, "--seed", "3", "--fps", "12", **place
    )
    assert answer["rc"] == 0, answer
    frames = iio.imread(video, plugin="FFMPEG")
    assert frames.shape == (17, 96, 96, 3)
    assert iio.immeta(video, plugin="FFMPEG")["fps"] == 12
    run_text(cpp_build, whole_bundle, tmp_path / "png", "--prompt", PROMPT, "--seed", "3")
    exact = frames_of(tmp_path / "png").astype(int)
    assert np.abs(exact - frames).mean() < 12, "the same video, encoded with loss"
    (tmp_path / "none").mkdir()

    def fault() -> str:
        place = {"PATH": str(tmp_path / "none")}
        answer = run_text(cpp_build, whole_bundle, tmp_path / "no.mp4", "--prompt", PROMPT, **place)
        return str(answer["error"]["message"])

    assert "no ffmpeg is on the PATH" in fault()
    (tmp_path / "none" / "ffmpeg").write_text("#!/bin/sh\nexit 3\n")
    (tmp_path / "none" / "ffmpeg").chmod(0o755)
    assert "can't write the video" in fault()
    assert not [p for p in tmp_path.iterdir() if "no.mp4" in p.name]
