"""Pipelines of any model: what their call takes, and what `run` makes with them."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    DiffusionPipeline,
    DiTPipeline,
    FluxPipeline,
)
from PIL import Image
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2] / "compiler/cut"))
sys.path.insert(0, str(Path(__file__).parents[2] / "compiler/models"))
import test_flux
import test_ltx
from cases import case
from whole import WHOLE, save_pipeline

from freewheel.bundle.reader import Bundle
from freewheel.cli import app
from freewheel.compiler.defaults import pipeline_defaults
from freewheel.core.errors import RequestError
from freewheel.policies.setting import CacheSetting
from freewheel.runtime.pipeline.call import PipelineCall, media_of, pipeline_for
from freewheel.runtime.pipeline.generate import Generator
from freewheel.runtime.pipeline.request import GenerationRequest

PROMPT = "a red circle"
EVERY_RUN = ("flux", "ltx")
NAMES = [
    pytest.param(name, marks=() if name in EVERY_RUN else pytest.mark.nightly)
    for name in WHOLE
    if name != "stable_audio"  # which has no row
]
FAMILIES = {"flux": test_flux, "ltx": test_ltx}
"""Models whose graphs other tests trace too."""

EXTRA: dict[str, dict[str, Any]] = {
    "pixart": {"use_resolution_binning": False, "clean_caption": False},
    "longcat_audio": {"audio_duration_s": 0.002},
}
"""What lets a pipeline make the small size that is asked for, as it stands."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    base = tmp_path_factory.mktemp("whole")

    def folder(name: str) -> Path:
        if not (base / name).is_dir():
            family = FAMILIES.get(name)
            model = family.model_of(family.TINY) if family is not None else case(name).model
            save_pipeline(name, model, base / name)
        return base / name

    return folder


@pytest.fixture(scope="module")
def bundles(
    folders: Callable[[str], Path], build_bundle: Callable[..., Bundle]
) -> Callable[[str], Bundle]:
    made: dict[str, Bundle] = {}

    def bundle(name: str) -> Bundle:
        if name not in made:
            made[name] = build_bundle(
                folders(name), ("onnxruntime",), policies=["taylorseer", "teacache"]
            )
        return made[name]

    return bundle


def request_of(bundle: Bundle, cache: CacheSetting | None = None, **given: Any) -> Any:
    manifest = bundle.manifest
    defaults = manifest.configs[manifest.default_config].generation
    size = {"height": 64, "width": 64, "steps": 6, "seed": 3}
    return GenerationRequest(
        prompt=PROMPT, cache=cache or CacheSetting(), defaults=defaults, **{**size, **given}
    )


def plain(folder: Path) -> Any:
    index = json.loads((folder / "model_index.json").read_text())
    pipe = getattr(diffusers, index["_class_name"]).from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def asked(call: PipelineCall, **values: Any) -> dict[str, Any]:
    """Return a call's arguments by hand, at the size of `request_of`."""
    given: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 6, "output_type": "np"}
    given["generator"] = torch.Generator().manual_seed(3)
    given |= {"height": 64, "width": 64} if "height" in call.parameters else {}
    given |= {"negative_prompt": ""} if "negative_prompt" in call.parameters else {}
    return {**given, **values}


def close(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> bool:
    """Tell whether two pictures differ by rounding alone."""
    return bool(np.abs(found.astype(int) - expected.astype(int)).max() <= 2)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_gives_what_the_plain_pipeline_gives(
    name: str, folders: Callable[[str], Path], bundles: Callable[[str], Bundle]
) -> None:
    bundle, extra = bundles(name), EXTRA.get(name, {})
    pipe = plain(folders(name))
    call = PipelineCall(type(pipe), embeds_guidance=False)
    frames: dict[str, Any] = {"frames": 9} if call.makes_video else {}
    if "height" not in call.parameters:
        frames |= {"height": None, "width": None}
    own = {str(call.parameter("frames")): 9} if call.makes_video else {}
    given = asked(call, **own, **extra, **call.without_parts)
    wanted = media_of(pipe, pipe(**given))
    expected = wanted.frames
    maker = Generator(bundle)
    exact = maker.generate(request_of(bundle, extra=extra, **frames))
    if wanted.sound is not None:
        assert exact.sound is not None
        rate = pipe.vocoder.config.output_sampling_rate if call.makes_video else pipe.sample_rate
        assert exact.sound.rate == wanted.sound.rate == rate
        np.testing.assert_allclose(exact.sound.samples, wanted.sound.samples, atol=1e-3)
    if wanted.sound is None or call.makes_video:
        assert exact.frames.shape == (9 if call.makes_video else 1, 64, 64, 3)
        assert close(exact.frames, expected)
    assert exact.statistics.computed_steps == 6
    steps: list[int] = []
    cached = maker.generate(
        request_of(bundle, CacheSetting(policy="taylorseer"), extra=extra, **frames),
        on_step=lambda done, total: steps.append(done),
    )
    assert steps == list(range(1, 7))
    assert cached.statistics.computed_steps < 6
    made, before = (g.frames if g.sound is None else g.sound.samples for g in (cached, exact))
    assert not np.array_equal(made, before)


def picture(folder: Path, name: str = "picture.png", size: int = 64) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / name)
    return folder / name


def test_a_picture_to_begin_with_goes_to_the_pipeline_that_takes_one(
    folders: Callable[[str], Path], bundles: Callable[[str], Bundle], tmp_path: Path
) -> None:
    bundle, first = bundles("flux"), picture(tmp_path)
    own = plain(folders("flux"))
    call = PipelineCall(type(own), embeds_guidance=True)
    pipe = AutoPipelineForImage2Image.from_pipe(own)
    given = {"image": Image.open(first), "strength": 0.5, "guidance_scale": 3.5}
    expected = media_of(pipe, pipe(**asked(call, **given))).frames
    told: list[tuple[int, int]] = []
    found = Generator(bundle).generate(
        request_of(bundle, image=first, strength=0.5), on_step=lambda *both: told.append(both)
    )
    assert close(found.frames, expected)
    assert found.statistics.steps == 3  # of 6, the noisier half is left out
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_a_mask_says_what_is_made_anew(
    folders: Callable[[str], Path], bundles: Callable[[str], Bundle], tmp_path: Path
) -> None:
    bundle, first = bundles("flux"), picture(tmp_path)
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 64, 32))
    mask.save(tmp_path / "mask.png")
    own = plain(folders("flux"))
    call = PipelineCall(type(own), embeds_guidance=True)
    pipe = AutoPipelineForInpainting.from_pipe(own)
    given = {"image": Image.open(first), "mask_image": mask, "strength": 0.7, "guidance_scale": 3.5}
    expected = media_of(pipe, pipe(**asked(call, **given))).frames
    asking = request_of(bundle, image=first, mask=tmp_path / "mask.png", strength=0.7)
    assert close(Generator(bundle).generate(asking).frames, expected)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"frames": 5}, "--frames: is nothing that FluxPipeline takes, which makes a picture"),
        ({"strength": 0.5}, "--strength: is nothing that FluxPipeline takes"),
        ({"strength": 1.5}, "--strength 1.5: is outside (0, 1]"),
        ({"extra": {"guidance": 1}}, "--set-pipe guidance: is nothing that FluxPipeline takes"),
        ({"extra": {"height": 1}}, "--set-pipe height: has an option of its own; use --height"),
        ({"extra": {"guidance_scale": 1}}, "has an option of its own; use --guidance"),
        ({"extra": {"generator": 1}}, "--set-pipe generator: is given by freewheel itself"),
        ({"height": 60}, "--height 60: is no multiple of 16; use 64"),
    ],
)
def test_what_the_pipeline_does_not_take_is_refused(
    bundles: Callable[[str], Bundle], maker: Generator, given: dict[str, Any], says: str
) -> None:
    with pytest.raises(RequestError, match=re.escape(says)):
        maker.generate(request_of(bundles("flux"), **given))


def test_frames_of_half_a_patch_are_refused_before_the_run(
    bundles: Callable[[str], Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a bundle whose model takes two latent frames as one."""
    bundle = bundles("ltx")
    monkeypatch.setitem(bundle.manifest.dims, "tokens", [("frames", 2), ("height", 1)])
    with pytest.raises(RequestError, match=r"--frames 17: is not 9 more than a multiple of 16"):
        Generator(bundle).generate(request_of(bundle, frames=17))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--prompt", "x", "--out", "v.mp4"], "can't hold what FluxPipeline makes, a picture"),
        (
            ["--prompt", "x", "--frames", "5", "--out", "v.png"],
            "--frames: is nothing that FluxPipe",
        ),
        (
            ["--prompt", "x", "--set-pipe", "what=1", "--out", "v.png"],
            "--set-pipe what: is nothing",
        ),
        (["--out", "v.png"], "prompt: is missing: FluxPipeline begins with one"),
    ],
)
def test_nothing_is_loaded_for_what_is_refused(
    bundles: Callable[[str], Bundle],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "from_pretrained" not in vars(FluxPipeline)
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", None)
    done = CliRunner().invoke(app, ["run", str(bundles("flux").folder), *arguments])
    assert done.exit_code == 3, done.output
    assert says in " ".join(done.output.split())
    assert not list(tmp_path.iterdir())


def test_a_pipeline_of_classes_takes_no_prompt() -> None:
    with pytest.raises(RequestError, match="--prompt: is nothing that DiTPipeline takes"):
        PipelineCall(DiTPipeline, embeds_guidance=False).check_given(["prompt"])


@pytest.fixture(scope="module")
def maker(bundles: Callable[[str], Bundle]) -> Generator:
    return Generator(bundles("flux"))


def test_another_argument_reaches_the_call(
    bundles: Callable[[str], Bundle], maker: Generator
) -> None:
    bundle = bundles("flux")
    two = maker.generate(request_of(bundle, extra={"num_images_per_prompt": 2}))
    assert two.frames.shape == (2, 64, 64, 3)


def test_a_shift_that_is_asked_for_is_taken(
    bundles: Callable[[str], Bundle], maker: Generator
) -> None:
    """FLUX's scheduler shifts by the size of the latents, which takes no account of one."""
    bundle = bundles("flux")
    own = maker.generate(request_of(bundle))
    shifted = maker.generate(request_of(bundle, flow_shift=9.0))
    assert maker.timesteps(request_of(bundle)) is None
    assert not np.array_equal(own.frames, shifted.frames)
    assert np.array_equal(maker.generate(request_of(bundle)).frames, own.frames)


def test_guidance_is_the_models_own_where_it_takes_one() -> None:
    embedded = PipelineCall(diffusers.FluxPipeline, embeds_guidance=True)
    assert embedded.parameter("guidance_scale") == "guidance_scale"
    for pipeline in (diffusers.FluxPipeline, diffusers.QwenImagePipeline):
        assert PipelineCall(pipeline, False).parameter("guidance_scale") == "true_cfg_scale"
    assert (
        PipelineCall(diffusers.WanPipeline, False).parameter("guidance_scale") == "guidance_scale"
    )


@pytest.mark.parametrize(
    ("pipeline", "kind"),
    [
        ("FluxPipeline", (False, False)),
        ("WanPipeline", (True, False)),
        ("SanaVideoPipeline", (True, False)),
        ("WanVideoToVideoPipeline", (True, False)),
        ("StableAudioPipeline", (False, True)),
        ("StableAudio3Pipeline", (False, True)),
        ("AceStepPipeline", (False, True)),
    ],
)
def test_what_a_pipeline_makes_is_read_from_its_call(
    pipeline: str, kind: tuple[bool, bool]
) -> None:
    call = PipelineCall(getattr(diffusers, pipeline), False)
    assert (call.makes_video, call.makes_sound) == kind


def test_a_pipeline_without_another_stays(folders: Callable[[str], Path]) -> None:
    pipe = plain(folders("ltx"))
    assert pipeline_for(pipe, ["mask"]) is pipe


def test_defaults_are_the_pipelines_own(folders: Callable[[str], Path]) -> None:
    assert pipeline_defaults(folders("flux")) == {
        "steps": 28,
        "height": 1024,
        "width": 1024,
        "frames": 1,
        "guidance_scale": 3.5,
        "text_tokens": 512,
    }
    assert pipeline_defaults(folders("ltx"))["frames"] == 161
    assert pipeline_defaults(None) == {}


def test_the_command_line_makes_a_picture(bundles: Callable[[str], Bundle], tmp_path: Path) -> None:
    bundle, out = bundles("flux"), tmp_path / "out.png"
    arguments = [
        "run", bundle.folder, "--prompt", PROMPT, "--height", 64, "--width", 64, "--steps", 4,
        "--image", picture(tmp_path), "--strength", 0.75, "--set-pipe", "num_images_per_prompt=2",
    ]  # fmt: skip

    def run(*more: object) -> Any:
        return CliRunner().invoke(app, [str(a) for a in (*arguments, *more)])

    made = run("--out", out, "--json")
    assert made.exit_code == 0, made.output
    assert json.loads(made.stdout)["written"] == [str(out)]
    assert Image.open(out).size == (128, 64)
    refused = run("--out", tmp_path / "out.mp4")
    assert refused.exit_code == 3
    assert "can't hold what FluxImg2ImgPipeline makes, a picture" in refused.output
    assert not (tmp_path / "out.mp4").exists()
