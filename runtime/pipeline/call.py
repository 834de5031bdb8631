# SPDX-License-Identifier: Apache-2.0
"""What the call of a diffusers pipeline takes, in a request's words, and what comes back from it."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines import auto_pipeline
from numpy.typing import NDArray

from ...core.errors import RequestError
from .sound import Sound

__all__ = [
    "FLAGS",
    "SECONDS",
    "Media",
    "PipelineCall",
    "class_for",
    "diffusers_pipeline",
    "flag_of",
    "media_of",
    "pipeline_for",
]

NAMES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "steps": ("num_inference_steps",),
        "frames": ("num_frames", "frames", "video_length"),
        "text_tokens": ("max_sequence_length",),
        "mask": ("mask_image", "mask"),
    }
)
"""Value of a request → what pipelines call it; one that is not here has its own name."""

FLAGS: Mapping[str, str] = MappingProxyType(
    {"guidance_scale": "--guidance", "guidance_scale_2": "--guidance-2", "flow_shift": "--shift"}
)
"""Value of a request → its option, where that is not its name with dashes."""

OURS = frozenset({
    "prompt", "negative_prompt", "height", "width", "guidance_scale_2", "image", "video", "strength",
    *(name for names in NAMES.values() for name in names),
})  # fmt: skip
"""Parameters of calls that options of their own give."""

NOBODYS = frozenset(
    {
        "self",
        "generator",
        "output_type",
        "return_dict",
        "callback",
        "callback_steps",
        "callback_on_step_end",
        "callback_on_step_end_tensor_inputs",
    }
)
"""Parameters of calls that no text can give."""

SECONDS = ("audio_duration", "audio_duration_s", "audio_end_in_s", "duration")
"""Parameters of calls that tell how long the sound is."""

FITS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"sound": (".wav",), "a video": (".mp4", ".gif", ".webp", ".png"), "a picture": (".png",)}
)
"""What comes back → suffixes of files that hold it."""

WITHOUT_PARTS: Mapping[str, float] = MappingProxyType(
    {
        "stg_scale": 0.0,
        "audio_stg_scale": 0.0,
        "modality_scale": 1.0,
        "audio_modality_scale": 1.0,
    }
)
"""Scale of guidance by the model with parts of it left out, which no bundle has → off."""

TASKS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "mask": auto_pipeline.AUTO_INPAINT_PIPELINES_MAPPING,
        "video": auto_pipeline.AUTO_VIDEO2VIDEO_PIPELINES_MAPPING,
        "image": auto_pipeline.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
    }
)
"""What a request begins with → diffusers' pipelines of that task, by model; the first is tried first."""


class PipelineCall:
    """The call of a class of pipelines.

    Attributes:
        name: Of the class.
        parameters: What the call takes → its default; `inspect.Parameter.empty` has none.
    """

    def __init__(self, pipeline_class: type, embeds_guidance: bool) -> None:
        """Read the call's signature.

        Args:
            pipeline_class: Of diffusers.
            embeds_guidance: Whether the transformer takes the guidance scale as an input, as
                distilled models do.
        """
        self.name = pipeline_class.__name__
        signature = inspect.signature(pipeline_class.__call__)
        self.parameters = {n: p.default for n, p in signature.parameters.items() if n != "self"}
        is_true = "true_cfg_scale" in self.parameters and not embeds_guidance
        self._guidance = "true_cfg_scale" if is_true else "guidance_scale"

    def parameter(self, value: str) -> str | None:
        """Return the parameter that a request's value is given as; None where the call has none."""
        names = (self._guidance,) if value == "guidance_scale" else NAMES.get(value, (value,))
        return next((name for name in names if name in self.parameters), None)

    def default(self, value: str) -> Any:
        """Return what the call takes where a value is not given; None where it says nothing."""
        name = self.parameter(value)
        found = None if name is None else self.parameters[name]
        return None if found is inspect.Parameter.empty else found

    def wants(self, value: str) -> bool:
        """Tell whether the call can't do without a value."""
        name = self.parameter(value)
        return name is not None and self.parameters[name] is inspect.Parameter.empty

    @property
    def makes_sound(self) -> bool:
        """Whether sound comes back, and no picture."""
        return not self.parameters.keys().isdisjoint(SECONDS) and "height" not in self.parameters

    @property
    def seconds(self) -> float | None:
        """Length of the sound that the call makes where none is given; None where it says nothing."""
        told = (self.parameters.get(name) for name in SECONDS)
        return next((float(found) for found in told if isinstance(found, int | float)), None)

    @property
    def makes_video(self) -> bool:
        """Whether frames come back, and not one picture."""
        return self.parameter("frames") is not None or "num_videos_per_prompt" in self.parameters

    @property
    def makes(self) -> str:
        """What comes back, in words."""
        return "sound" if self.makes_sound else "a video" if self.makes_video else "a picture"

    @property
    def has_own_timesteps(self) -> bool:
        """Whether the call may set other noise levels than the scheduler does for a number of steps."""
        return "sigmas" in self.parameters

    @property
    def without_parts(self) -> dict[str, float]:
        """Arguments that turn guidance off which asks the model for less than all its parts."""
        return {name: off for name, off in WITHOUT_PARTS.items() if name in self.parameters}

    def check_extra(self, given: Mapping[str, Any]) -> None:
        """Refuse arguments of ``--set-pipe`` that the call does not take, or that we give it.

        Raises:
            RequestError: one is no parameter, or not one that a text can give.
        """
        for name in given:
            flag = f"--set-pipe {name}"
            if name in NOBODYS:
                raise RequestError(flag, "is given by freewheel itself", "leave it out")
            off = self.without_parts.get(name)
            if off is not None and given[name] != off:
                raise RequestError(
                    f"{flag}={given[name]}",
                    "asks for guidance by the model with parts left out",
                    f"leave it out: a bundle has all of them, and runs with {off:g}",
                )
            if name in OURS or name == self._guidance:
                option = next((v for v, names in NAMES.items() if name in names), name)
                option = "guidance_scale" if name == self._guidance else option
                raise RequestError(flag, "has an option of its own", f"use {flag_of(option)}")
            if name not in self.parameters:
                free = sorted(self.parameters.keys() - OURS - NOBODYS - {self._guidance})
                raise RequestError(
                    flag, f"is nothing that {self.name} takes", f"use one of {', '.join(free)}"
                )

    def check_out(self, out: Path) -> None:
        """Refuse a file that can't hold what the pipeline makes.

        Raises:
            RequestError: sound in a picture or video, a picture in a video, or either in a .wav.
        """
        if out.suffix.lower() not in FITS[self.makes]:
            raise RequestError(
                f"--out '{out}'",
                f"can't hold what {self.name} makes, {self.makes}",
                f"use {' or '.join(FITS[self.makes])}",
            )

    def check_given(self, given: Collection[str]) -> None:
        """Refuse values that a request asks for and the call does not take.

        Raises:
            RequestError: one has no parameter, or one that the call can't do without is missing.
        """
        for value in given:
            if self.parameter(value) is None:
                raise RequestError(
                    flag_of(value),
                    f"is nothing that {self.name} takes, which makes {self.makes}",
                    "leave it out",
                )


def flag_of(value: str) -> str:
    """Return the option that gives a request's value."""
    return FLAGS.get(value, f"--{value.replace('_', '-')}")


def diffusers_pipeline(name: Any) -> type[DiffusionPipeline] | None:
    """Return diffusers' pipeline class of a name; None where it has none."""
    found = getattr(diffusers, str(name), None)
    is_pipeline = isinstance(found, type) and issubclass(found, DiffusionPipeline)
    return found if is_pipeline else None


def class_for(own: type, given: Collection[str]) -> Any:
    """Return the pipeline's class that begins with what is given.

    Args:
        own: The class of the bundle's pipeline.
        given: Names of a request's values; of these ``mask``, ``video`` and ``image`` choose:
            image-to-image for a picture given to a text-to-image pipeline, and so on.

    Returns:
        ``own`` itself where its call takes them, or where diffusers has no other.
    """
    task = next((name for name in TASKS if name in given), None)
    if task is None or PipelineCall(own, embeds_guidance=False).parameter(task) is not None:
        return own
    others: Any = auto_pipeline.SUPPORTED_TASKS_MAPPINGS
    models = [model for known in others for model, made in known.items() if made is own]
    return next((TASKS[task][model] for model in models if model in TASKS[task]), own)


def pipeline_for(pipe: Any, given: Collection[str]) -> Any:
    """Return a pipeline of the same parts that begins with what is given, as `class_for` says."""
    found = class_for(type(pipe), given)
    if found is type(pipe):
        return pipe
    parts: dict[str, Any] = {**pipe.config, **pipe.components}
    return found(
        **{n: parts[n] for n in inspect.signature(found.__init__).parameters if n in parts}
    )


@dataclass(frozen=True)
class Media:
    """What a pipeline made.

    Attributes:
        frames: uint8 [frames, height, width, 3]; of pictures one frame each; none of sound.
        sound: What can be heard, or None.
    """

    frames: NDArray[np.uint8]
    sound: Sound | None = None


def media_of(pipe: Any, result: Any) -> Media:
    """Read a pipeline's answer, asked for with ``output_type="np"``.

    Args:
        pipe: Which made it.
        result: Its output object: ``frames``, ``images`` or ``audios``, of one prompt.

    Raises:
        RequestError: it has none of these.
    """
    if "frames" in result:
        heard = result.get("audio")
        return Media(_pictures(result["frames"][0]), None if heard is None else _sound(pipe, heard))
    if "images" in result:
        return Media(_pictures(result["images"]))
    if "audios" in result:
        return Media(np.zeros((0, 0, 0, 3), np.uint8), _sound(pipe, result["audios"]))
    raise RequestError(
        type(pipe).__name__,
        f"made {', '.join(result)}, and no frames, images or audios",
        "attach the bundle to this pipeline in Python",
    )


def _pictures(found: Any) -> NDArray[np.uint8]:
    """Return pictures as bytes: what diffusers gives from 0 to 1, or PIL's."""
    pictures = np.stack([np.asarray(picture) for picture in found])
    if pictures.dtype != np.uint8:
        pictures = (pictures * 255).round().clip(0, 255).astype(np.uint8)
    return pictures[..., :3]


def _sound(pipe: Any, found: Any) -> Sound:
    """Return the first recording of a batch, with the rate that the pipeline's parts tell."""
    vocoder, vae = (getattr(getattr(pipe, n, None), "config", None) for n in ("vocoder", "vae"))
    rate = (
        getattr(vocoder, "output_sampling_rate", None)
        or getattr(pipe, "sample_rate", None)
        or getattr(vae, "sampling_rate", None)
        or 44100
    )
    samples = torch.as_tensor(found[0]).detach().to("cpu", torch.float32).numpy()
    return Sound(np.atleast_2d(samples), int(rate))
