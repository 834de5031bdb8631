# SPDX-License-Identifier: Apache-2.0
"""Prompt in, video out: a bundle's whole pipeline, with what it did."""

from __future__ import annotations

import inspect
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from ...bundle.manifest import ResolvedGeneration
from ...bundle.reader import Bundle
from ...bundle.safetensors_header import read_header
from ...bundle.sampler import DISTILLED, SAMPLERS, check_sampler
from ...core.errors import BundleError, RequestError
from ...core.limits import LARGEST_SEED, check_size
from ...policies.setting import CacheSetting
from ..distributed.ranks import Ranks
from ..model import DeviceOptions
from ..session import Recorder
from ..statistics import RunStatistics
from .attach import FreewheelTransformer, attach
from .schedulers import make_scheduler

__all__ = ["Generation", "GenerationRequest", "Generator", "check_recordable", "loaded_bytes"]

FLOAT32_TEXT_ENCODER_BYTES = 2 << 30
TRANSFORMERS = {"transformer", "transformer_2"}
"""Parts of a pipeline that a bundle takes the place of."""

VALUES = (
    "steps", "height", "width", "frames", "guidance_scale", "guidance_scale_2", "seed", "sampler",
    "flow_shift",
)  # fmt: skip
"""What a run says of itself as resolved."""

OnStep = Callable[[int, int], None]


@dataclass(frozen=True)
class GenerationRequest:
    """One run; None takes the config's value.

    Attributes:
        prompt: What to show.
        cache: Resolved cache setting.
        defaults: Generation values of the config.
        negative_prompt: What not to show.
        steps: Denoise steps.
        height: Pixels.
        width: Pixels.
        frames: Frames of the video.
        guidance_scale: 1 turns guidance off.
        seed: Of the initial noise.
        sampler: Which one denoises.
        flow_shift: Of its noise levels.
        guidance_scale_2: Of the second expert, where there are two.
        image: First frame, for image-to-video. Where neither height nor width is asked for, the
            video takes its proportions, at the area that the config names.
    """

    prompt: str
    cache: CacheSetting
    defaults: ResolvedGeneration
    negative_prompt: str = ""
    steps: int | None = None
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    guidance_scale: float | None = None
    seed: int | None = None
    sampler: str | None = None
    flow_shift: float | None = None
    guidance_scale_2: float | None = None
    image: Path | None = None

    def value(self, name: str) -> Any:
        """Return a setting: the request's, else the config's.

        A request's guidance is that of both experts, unless it names the second's too.
        """
        found = getattr(self, name, None)
        if name == "guidance_scale_2" and self.guidance_scale is not None:
            return found
        return getattr(self.defaults, name) if found is None else found

    def check(self) -> None:
        """Refuse values that no model takes, before anything is loaded.

        Raises:
            RequestError: steps outside [1, 1000], a size beyond 32,768, a guidance scale that is
                not finite, a seed outside [0, 2**63), a sampler that is not known, a flow shift
                that is not above 0, or an image that can't be read.
        """
        steps, seed, guidance = (self.value(n) for n in ("steps", "seed", "guidance_scale"))
        if not 1 <= steps <= 1000:
            raise RequestError(f"--steps {steps}", "is outside [1, 1000]", "use 20 to 50")
        if not 0 <= seed <= LARGEST_SEED:
            raise RequestError(f"--seed {seed}", "is outside [0, 2**63)", "use --seed 42")
        if not math.isfinite(guidance):
            raise RequestError(
                f"--guidance {guidance}", "is not finite", "use 1 to 10; 1 turns guidance off"
            )
        if self.guidance_scale_2 is not None and not math.isfinite(self.guidance_scale_2):
            raise RequestError(
                f"--guidance-2 {self.guidance_scale_2}", "is not finite", "use 1 to 10"
            )
        shift = self.value("flow_shift")
        if not (math.isfinite(shift) and shift > 0):
            raise RequestError(f"--shift {shift}", "is no number above 0", "use 1 to 12")
        if self.value("sampler") is not None:
            check_sampler(self.value("sampler"))
        for name in ("height", "width", "frames"):
            check_size(name, self.value(name))
        if self.image is not None:
            open_image(self.image)


@dataclass(frozen=True)
class Generation:
    """What came out.

    Attributes:
        frames: uint8 [frames, height, width, 3]; none but on the rank that leads.
        latents: float32 [1, channels, frames, height, width], before decoding.
        statistics: Decisions and seconds of the denoise loop.
        seconds: ``text``+``denoise``+``decode`` seconds.
        resolved: The values used.
    """

    frames: NDArray[np.uint8]
    latents: torch.Tensor
    statistics: RunStatistics
    seconds: dict[str, float]
    resolved: dict[str, Any]

    def speedup_over(self, uncached: Generation) -> float:
        """Return the measured speedup: denoise seconds of an uncached run / of this one."""
        return uncached.seconds["denoise"] / self.seconds["denoise"]


def check_recordable(bundle: Bundle) -> None:
    """Refuse to record a run of two transformers: traces, and what is fitted to them, are of one.

    Raises:
        RequestError: the bundle has two experts.
    """
    if len(bundle.manifest.experts) > 1:
        raise RequestError(
            f"bundle '{bundle.folder}'", "has two transformers, and a recorded run is of one",
            "record, calibrate and tune with a bundle of each transformer's folder",
        )  # fmt: skip


class Generator:
    """A bundle with its pipeline around it, ready for any number of requests."""

    def __init__(
        self, bundle: Bundle, *, backend: str | None = None, loras: Sequence[str] = (),
        model: Path | None = None, options: DeviceOptions | None = None,
        ranks: Ranks | None = None,
    ) -> None:  # fmt: skip
        """Load text encoder, VAE and scheduler, and attach the bundle.

        Args:
            bundle: An open bundle.
            backend: Name of a backend; None takes the bundle's first.
            loras: ``FILE[:scale]``.
            model: Diffusers folder with the rest of the pipeline, where the bundle has none.
            options: How engines are driven: weights kept in host memory, CUDA graphs.
            ranks: Processes that share the branches of every run; None runs them all here.

        Raises:
            BundleError: the rest of the pipeline can't be found.
        """
        import diffusers

        folder = self._pipeline_folder(bundle, model)
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        # NOTE: the pipeline's own class; DiffusionPipeline would load the transformer all the same.
        pipeline_class = getattr(diffusers, str(index.get("_class_name")), None)
        is_pipeline = isinstance(pipeline_class, type) and issubclass(
            pipeline_class, diffusers.DiffusionPipeline
        )
        if pipeline_class is None or not is_pipeline:
            raise BundleError(
                str(folder / "model_index.json"),
                f"'_class_name' {index.get('_class_name')!r} is no pipeline of diffusers",
                "build the bundle again",
            )
        self.pipe: Any = pipeline_class.from_pretrained(
            folder,
            **dict.fromkeys(TRANSFORMERS & index.keys()),
            dtype=part_dtypes(folder),
            local_files_only=True,
            use_safetensors=True,  # a bundle from elsewhere may hold a pickle
        )
        self.pipe.set_progress_bar_config(disable=True)
        self._own_scheduler = self.pipe.scheduler
        self.bundle = bundle
        self.transformer: FreewheelTransformer = attach(
            self.pipe, bundle, "off", backend=backend, loras=loras, options=options, ranks=ranks
        )
        self._ranks = ranks
        for expert in self.transformer.experts:
            expert.warn = lambda text: None  # callers read the statistics' warnings
        self.pipe.to(self.transformer.device)

    @staticmethod
    def _pipeline_folder(bundle: Bundle, model: Path | None) -> Path:
        entry = bundle.manifest.pipeline
        folder = model or (bundle.path(entry.folder) if entry.folder else Path(entry.source or ""))
        if not (folder / "model_index.json").is_file():
            raise BundleError(
                f"{bundle.folder}, 'pipeline'", f"is not to be found at '{folder}'",
                "give the checkpoint's diffusers folder with --model",
            )  # fmt: skip
        return folder

    def generate(
        self, request: GenerationRequest, *, recorder: Recorder | None = None,
        on_step: OnStep = lambda done, total: None,
    ) -> Generation:  # fmt: skip
        """Run one request.

        Args:
            request: Prompt and settings.
            recorder: Gets the trace.
            on_step: Called after each step with steps done and steps in all.

        Raises:
            RequestError: values that `GenerationRequest.check` refuses, sizes that the model can't
                take, or an image missing or given to a text-to-video model.
        """
        request.check()
        image = self._image(request)
        values = self._checked_values(request, image)

        def tell(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            on_step(step + 1, values["steps"])
            return tensors

        experts = self.transformer.experts
        if recorder is not None and not recorder.across_experts:
            check_recordable(self.bundle)
        self.transformer.use(request.cache)
        for expert in experts:
            expert.recorder = recorder
        before = [expert.statistics for expert in experts]
        arguments: dict[str, Any] = {
            "prompt": request.prompt,
            "negative_prompt": request.negative_prompt,
            "height": values["height"],
            "width": values["width"],
            "num_frames": values["frames"],
            "num_inference_steps": values["steps"],
            "guidance_scale": values["guidance_scale"],
            "generator": torch.Generator().manual_seed(values["seed"]),
            "output_type": "latent",
            "callback_on_step_end": tell,
        }
        arguments["max_sequence_length"] = request.value("text_tokens")
        if "guidance_scale_2" in values:
            arguments["guidance_scale_2"] = values["guidance_scale_2"]
        if image is not None:
            # Filled and cut, as other resizing would stretch it.
            arguments["image"] = ImageOps.fit(image, (values["width"], values["height"]))
        self._set_scheduler(request)
        began = time.perf_counter()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(values["seed"])  # of samplers that draw noise at every step
            latents = self.pipe(**arguments).frames
        denoised = time.perf_counter()
        if self._ranks is not None:
            self._ranks.tell({}, "ending the run")  # the first to end must not seem lost
        leads = self._ranks is None or self._ranks.leads
        frames = self.decode(latents) if leads else np.zeros((0, 0, 0, 3), np.uint8)
        for expert in experts:
            expert.session.model.save_caches()
        ran = [e.statistics for e, b in zip(experts, before, strict=True) if e.statistics is not b]
        seconds = {"denoise": denoised - began, "decode": time.perf_counter() - denoised}
        return Generation(frames, latents, RunStatistics.joined(ran), seconds, values)

    def values(self, request: GenerationRequest) -> dict[str, Any]:
        """Return the values that a request resolves to, as `Generation.resolved` has them.

        Raises:
            RequestError: as `generate` does.
        """
        request.check()
        return self._checked_values(request, self._image(request))

    def timesteps(self, request: GenerationRequest) -> torch.Tensor:
        """Return the timesteps that a request will run through, [steps].

        Raises:
            RequestError: as `generate` does.
        """
        values = self.values(request)
        self._set_scheduler(request)
        self.pipe.scheduler.set_timesteps(values["steps"])
        return torch.as_tensor(self.pipe.scheduler.timesteps)

    def _set_scheduler(self, request: GenerationRequest) -> None:
        shift, name = request.value("flow_shift"), request.value("sampler")
        own = self._own_scheduler
        if name is not None:
            is_own = name in SAMPLERS and SAMPLERS[name] == type(own).__name__ and name != DISTILLED
            self.pipe.scheduler = make_scheduler(name, shift, dict(own.config) if is_own else None)
            return
        key = next((k for k in ("flow_shift", "shift") if k in own.config), None)
        if key is not None and own.config[key] != shift:
            own = type(own).from_config(own.config, **{key: shift})
        self.pipe.scheduler = own

    def decode(self, latents: torch.Tensor) -> NDArray[np.uint8]:
        """Decode latents to frames, uint8 [frames, height, width, 3]."""
        vae = self.pipe.vae
        shape = (1, vae.config.z_dim, 1, 1, 1)
        mean = torch.tensor(vae.config.latents_mean).view(shape).to(latents)
        std = torch.tensor(vae.config.latents_std).view(shape).to(latents)
        with torch.no_grad():
            video = vae.decode((latents * std + mean).to(vae.dtype), return_dict=False)[0]
        frames = self.pipe.video_processor.postprocess_video(video, output_type="np")[0]
        return (np.asarray(frames) * 255).round().clip(0, 255).astype(np.uint8)

    def _checked_values(
        self, request: GenerationRequest, image: Image.Image | None
    ) -> dict[str, Any]:
        values = {n: v for n in VALUES if (v := request.value(n)) is not None}
        if "guidance_scale_2" in values and len(self.bundle.manifest.experts) < 2:
            raise RequestError(
                f"--guidance-2 {values['guidance_scale_2']}", "is given, and the bundle has one expert",
                "leave it out, or give one 'sample_guide_scale'",
            )  # fmt: skip
        scale = self.bundle.manifest.latent_scale
        spatial = scale.pixels * max(self.transformer.config["patch_size"][1:])
        if image is not None and request.height is None and request.width is None:
            area = values["height"] * values["width"]
            values["height"], values["width"] = size_like(image, area, spatial)
        for name in ("height", "width"):
            if values[name] < spatial or values[name] % spatial:
                raise RequestError(
                    f"--{name} {values[name]}", f"is no multiple of {spatial}",
                    f"use {max(spatial, round(values[name] / spatial) * spatial)}",
                )  # fmt: skip
        step = scale.frames
        if values["frames"] < 1 or (values["frames"] - 1) % step:
            raise RequestError(
                f"--frames {values['frames']}", f"is not 1 more than a multiple of {step}",
                f"use {max(0, round((values['frames'] - 1) / step)) * step + 1}",
            )  # fmt: skip
        return values

    def _image(self, request: GenerationRequest) -> Image.Image | None:
        """Open the request's image, where the pipeline begins with one."""
        takes_image = "image" in inspect.signature(self.pipe.__call__).parameters
        if request.image is None:
            if takes_image:
                raise RequestError(
                    "image", "is missing: this is an image-to-video model", "give --image FILE"
                )
            return None
        if not takes_image:
            raise RequestError(
                f"--image '{request.image}'", "is given to a text-to-video model",
                "leave it out, or build an image-to-video checkpoint",
            )  # fmt: skip
        return open_image(request.image)


def open_image(path: Path) -> Image.Image:
    """Read a picture as RGB.

    Raises:
        RequestError: it is missing, damaged or no picture.
    """
    try:
        return Image.open(path).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise RequestError(
            f"--image '{path}'", f"can't be read: {error}", "give a png or jpeg"
        ) from error


def part_dtypes(folder: Path) -> dict[str, torch.dtype]:
    """Choose what a pipeline's parts are loaded in: float32, but a large text encoder."""
    size = sum(f.stat().st_size for f in (folder / "text_encoder").glob("*.safetensors"))
    small = size <= FLOAT32_TEXT_ENCODER_BYTES
    return {
        "default": torch.float32,
        "text_encoder": torch.float32 if small else torch.bfloat16,
    }


def loaded_bytes(folder: Path) -> dict[str, int]:
    """Return the bytes that each part of a pipeline takes once `Generator` has loaded it.

    Args:
        folder: A pipeline in diffusers layout.

    Raises:
        CheckpointError: a weight file's header can't be read.
    """
    dtypes = part_dtypes(folder)
    found: dict[str, int] = {}
    for file in sorted(folder.glob("*/*.safetensors")):
        part = file.parent.name
        if part.startswith("transformer"):
            continue
        item_bytes = dtypes.get(part, dtypes["default"]).itemsize
        count = sum(prod(t.shape) for t in read_header(file).values())
        found[part] = found.get(part, 0) + item_bytes * count
    return found


def size_like(image: Image.Image, area: int, multiple: int) -> tuple[int, int]:
    """Return the height and width of about ``area`` pixels in the proportions of ``image``.

    Both are multiples of ``multiple``, rounded down as Wan's own scripts do.
    """
    ratio = image.height / image.width
    height, width = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
    return max(multiple, height // multiple * multiple), max(multiple, width // multiple * multiple)
