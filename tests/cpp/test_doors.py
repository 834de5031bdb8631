"""One bundle, one video: a request that says little gives the same bits through every door."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from doors import CONFIGS, LORA_REQUESTS, REQUESTS, Doors
from safetensors.numpy import load_file, save_file

from freewheel.bundle.reader import Bundle

pytestmark = [pytest.mark.openvino, pytest.mark.slow]


@pytest.fixture(scope="module")
def doors(
    build_bundle: Callable[..., Bundle],
    tiny_checkpoint: Path,
    cpp_build: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Doors:
    """The tiny model with two configs of which the default names a size and nothing else."""
    bundle = build_bundle(tiny_checkpoint, ("openvino",), configs=CONFIGS)
    return Doors(bundle, cpp_build, tmp_path_factory.mktemp("doors"))


COMPUTED = {
    "another number of computed steps": 7,
    "a deadline that nothing keeps": 5,
    "a deadline far off": 7,
    "a bound on quality": 7,
}


@pytest.mark.parametrize("name", REQUESTS)
def test_a_request_gives_the_same_bits_through_every_door(doors: Doors, name: str) -> None:
    cache, overrides = REQUESTS[name]
    noise, in_c = doors.in_c(cache, overrides)
    expected, branches = doors.in_python(cache, overrides, noise)
    assert np.array_equal(in_c.reshape(expected.shape), expected)
    assert np.array_equal(doors.in_shell(cache, overrides), expected)
    assert {len(b["computed"]) for b in branches.values()} == {4 if cache == "listed" else 50}
    assert all(b["computed"][0] for b in branches.values())
    reused = [not all(b["computed"]) for b in branches.values()]
    counts = {sum(b["computed"]) for b in branches.values()}
    if name in COMPUTED:
        assert counts == {COMPUTED[name]}
    assert all(reused) == (name not in ("nothing said", "a policy by name")), name


@pytest.mark.parametrize("name", LORA_REQUESTS)
def test_loras_give_the_same_bits_through_every_door(doors: Doors, name: str) -> None:
    cache, overrides, lora = LORA_REQUESTS[name]
    noise, in_c = doors.in_c(cache, overrides, lora)
    expected, _ = doors.in_python(cache, overrides, noise, lora)
    assert np.array_equal(in_c.reshape(expected.shape), expected)
    assert np.array_equal(doors.in_shell(cache, overrides, lora), expected)
    assert np.array_equal(doors.in_shell(cache, overrides, lora, options=["--offload"]), expected)
    plain = doors.in_shell(cache, overrides)
    assert np.abs(expected - plain).mean() > 0.01 * np.abs(plain).mean()


BAD_LORAS = {
    "no such name": ("stile", "did you mean 'style'"),
    "another folder": ("../loras/style", "is no plain name"),
    "a scale of letters": ("style:much", "has scale 'much'; write name:0.8"),
    "the same twice": ("style,style:0.5", "is named twice"),
    "another checkpoint's": ("foreign", "was written for the checkpoint 000000000000"),
    "a file as it was shared": ("source", "is no LoRA that 'freewheel lora' wrote"),
}


@pytest.mark.parametrize("case", BAD_LORAS)
def test_a_lora_that_can_t_be_used_is_refused_before_the_first_step(
    doors: Doors, tmp_path: Path, case: str
) -> None:
    lora, said = BAD_LORAS[case]
    state = load_file(doors.loras / "style.safetensors")
    marks = {"freewheel_lora": "1", "checkpoint_sha256": "0" * 64}
    save_file(state, doors.loras / "foreign.safetensors", metadata=marks)
    save_file(state, doors.loras / "source.safetensors")
    error = refused(
        doors.build,
        doors.bundle.folder,
        tmp_path / "x.npy",
        "--embeddings",
        doors.folder / "cond.npy",
        "--negative",
        doors.folder / "uncond.npy",
        "--lora-folder",
        doors.loras,
        *(part for use in lora.split(",") for part in ("--lora", use)),
    )
    assert said in error["message"]
    assert doors.refused_in_c(None, {}, lora) == error["message"]


def refused(
    build: Path, bundle: Path, out: object, *arguments: object, **environment: str
) -> dict[str, Any]:
    """Run freewheel-run, which must refuse before its first step; return its error."""
    command = [build / "freewheel-run", bundle, "--out", out, "--json", *arguments]
    done = subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 3, done.stdout + done.stderr
    assert "step 1/" not in done.stderr
    error: dict[str, Any] = json.loads(done.stdout)["error"]
    assert error["where"]
    assert error["hint"]
    return error


NOISE = "(start noise)"
BAD = {
    "no number of steps": (["--steps", 0], "has no table for 0 steps"),
    "guidance that is no number": (["--guidance", "nan"], "guidance_scale: is not finite"),
    "infinite guidance": (["--guidance", "inf"], "guidance_scale: is not finite"),
    "shift that is no number": (["--shift", "nan"], "flow shift"),
    "negative seed": (["--seed", -1], "seed: is -1; give a whole number from 0"),
    "height of no patch": (["--height", 40], "height: is 40, expected a multiple of 16 pixels"),
    "frames between two": (["--frames", 6], "frames: are 6, expected 1 more than a multiple of 4"),
    "absurd width": (["--width", 1 << 40], "width: is 1099511627776"),
    "a seed beside latents": (["--latents", NOISE, "--seed", 3], "comes with a seed; give one"),
    "a size beside latents": (["--latents", NOISE, "--frames", 5], "comes with a size"),
    "a scale of no second expert": (["--guidance-2", 3], "the bundle has one expert"),
    "old spelling": (["--set", "guard.first_exact=2"], "did you mean 'first_exact'"),
    "a list of other steps": (["--cache", "listed", "--steps", 5], "has no table for 5 steps"),
    "several overrides": (["--set", "a=1", "--set", "first_exact=-1"], "2 faults"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_value_is_refused_before_the_first_step(
    doors: Doors, tmp_path: Path, case: str
) -> None:
    arguments, said = BAD[case]
    np.save(doors.folder / "noise.npy", np.zeros((1, 4, 2, 4, 6), np.float32))
    given = [doors.folder / "noise.npy" if a == NOISE else a for a in arguments]
    error = refused(
        doors.build,
        doors.bundle.folder,
        tmp_path / "x.npy",
        "--embeddings",
        doors.folder / "cond.npy",
        "--negative",
        doors.folder / "uncond.npy",
        *given,
    )
    assert said in f"{error['message']}; {error['hint']}"
    assert not list(tmp_path.iterdir())


USAGE: dict[str, tuple[list[str], str]] = {
    "nothing": ([], "bundle is required"),
    "a value of another kind": (["b", "--out", "x.npy", "--fps", "x"], "--fps"),
    "more than Python takes": (["b", "--out", "x.mp4", "--fps", "1001"], "not in range 1 to 1000"),
    "no such option": (["b", "--out", "x.npy", "--frobnicate"], "--frobnicate"),
}


@pytest.mark.parametrize("case", USAGE)
def test_a_usage_error_is_an_object_too(cpp_build: Path, case: str) -> None:
    arguments, said = USAGE[case]
    for command in ([*arguments, "--json"], ["--json", *arguments]):
        done = subprocess.run(
            [cpp_build / "freewheel-run", *command], capture_output=True, text=True, check=False
        )
        assert done.returncode == 2
        error = json.loads(done.stdout)["error"]
        assert (error["code"], error["where"]) == ("usage", "freewheel-run")
        assert said in error["message"]
        assert done.stderr == ""


def test_a_path_of_no_utf8_is_told_of_in_an_object(cpp_build: Path, tmp_path: Path) -> None:
    command = [cpp_build / "freewheel-run", bytes(tmp_path) + b"/\xff", "--out", "x.npy", "--json"]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == 3, done.stderr
    assert "\ufffd" in json.loads(done.stdout)["error"]["message"]


@pytest.fixture(scope="module")
def large(doors: Doors, linked_bundle: Callable[..., Path]) -> Doors:
    """The bundle with a config `large`, of 20 times its size."""

    def with_a_large_config(manifest: dict[str, Any]) -> None:
        large = json.loads(json.dumps(manifest["configs"][manifest["default_config"]]))
        large["generation"]["height"] *= 20
        manifest["configs"]["large"] = large

    bundle = Bundle(linked_bundle(doors.bundle, with_a_large_config))
    folder = bundle.folder.parent / "doors"
    folder.mkdir()
    return Doors(bundle, doors.build, folder)


REFUSED: dict[str, tuple[str, dict[str, str], str]] = {
    "a config of a far greater size": ("large", {}, "20 times its latents"),
    "no policy of the bundle": ("tecache", {}, "did you mean 'teacache'"),
    "a value out of range": ("teacache", {"threshold": "-1"}, "threshold"),
    "several overrides": ("teacache", {"thresold": "1", "first_exact": "-1"}, "2 faults"),
    "a deadline of no schedules": ("teacache", {"deadline": "20s"}, "deadline of policy 'teacache'"),
    "a deadline of no seconds": ("frontier", {"deadline": "-1"}, "expected seconds above 0"),
    "a bound that nothing keeps": ("frontier", {"min_psnr": "51"}, "90 of 100 runs keep 50.0 dB at most"),
    "a bound of no held-out runs": ("teacache", {"min_psnr": "40"}, "--hold-out 20"),
    "a bound of no dB": ("frontier", {"min_psnr": "high"}, "expected dB above 0, found 'high'"),
    "a bound beside computed steps": (
        "frontier", {"min_psnr": "36", "computed_steps": "7"}, "chooses 'computed_steps', which is given too",
    ),
    "a bound beside a deadline": ("frontier", {"min_psnr": "36", "deadline": "9s"}, "beside a deadline"),
    "no such number of computed steps": (
        "frontier", {"computed_steps": "6"}, "6 is none of 'budgets'; give one of 5, 7, 20",
    ),
    "a pair that the bundle lacks": ("teacache+spectrum", {}, "--config teacache+spectrum too"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_says_the_same_in_the_shell_and_in_c(
    large: Doors, tmp_path: Path, case: str
) -> None:
    cache, overrides, said = REFUSED[case]
    error = refused(
        large.build,
        large.bundle.folder,
        tmp_path / "x.npy",
        "--embeddings",
        large.folder / "cond.npy",
        "--negative",
        large.folder / "uncond.npy",
        "--cache",
        cache,
        *(part for n, v in overrides.items() for part in ("--set", f"{n}={v}")),
    )
    assert said in error["message"]
    assert large.refused_in_c(cache, overrides) == error["message"]
    assert ("'force'" in error["hint"]) == (cache == "large")


def test_a_family_s_own_scale_and_order_make_the_latents(
    doors: Doors, linked_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    """A bundle of another VAE: the same pixels are other latents."""

    def coarse(manifest: dict[str, Any]) -> None:
        manifest["latent_scale"] = {"frames": 2, "pixels": 4}

    found = Doors(Bundle(linked_bundle(doors.bundle, coarse)), doors.build, tmp_path)
    latents = found.in_shell(None, {"first_exact": "1"})
    assert latents.shape == (1, 4, 3, 8, 12)
    noise, in_c = found.in_c(None, {"first_exact": "1"})
    assert np.array_equal(in_c.reshape(latents.shape), latents)
    assert noise.size == latents.size


OUT = {
    "a suffix that nothing is written in": ("x.avi", "has suffix '.avi'"),
    "a folder that holds files": ("full", "holds files already"),
    "a file's name with a slash": ("file.npy/", "is a file, not a folder"),
    "a name below a file": ("file.npy/x.npy", "is no folder"),
}


@pytest.mark.parametrize("case", OUT)
def test_an_out_that_can_t_be_written_is_refused_and_nothing_is_made(
    doors: Doors, tmp_path: Path, case: str
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "00000.png").touch()
    (tmp_path / "file.npy").touch()
    before = sorted(tmp_path.rglob("*"))
    name, said = OUT[case]
    error = refused(doors.build, doors.bundle.folder, f"{tmp_path}/{name}")
    assert said in error["message"]
    assert sorted(tmp_path.rglob("*")) == before


def test_a_home_folder_is_meant_by_its_sign(doors: Doors, tmp_path: Path) -> None:
    (tmp_path / "bundle").symlink_to(doors.bundle.folder)
    for name in ("cond", "uncond"):
        (tmp_path / f"{name}.npy").symlink_to(doors.folder / f"{name}.npy")
    command = [
        doors.build / "freewheel-run",
        "~/bundle",
        "--embeddings=~/cond.npy",
        "--negative=~/uncond.npy",
        "--out=~/new/x.npy",
        "--steps",
        1,
        "--quiet",
    ]
    done = subprocess.run(
        [str(c) for c in command],
        capture_output=True,
        text=True,
        check=False,
        env={"HOME": str(tmp_path)},
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["x.npy"], "no partial file stays"
    assert not (tmp_path / "~").exists()
