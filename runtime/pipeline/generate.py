# SPDX-License-Identifier: Apache-2.0
"""Prompt in, video, picture or sound out: a bundle's whole pipeline, with what it did."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from ...bundle.dims import check_video, divisor
from ...bundle.guidance import embeds_guidance
from ...bundle.reader import Bundle
from ...bundle.sampler import DISTILLED, SAMPLERS
from ...core.errors import BundleError, RequestError
from ..distributed.ranks import Ranks
from ..model import DeviceOptions
from ..statistics import RunStatistics
from ..step_record import Recorder
from .adapters import hollow_transformer
from .attach import attach
from .call import (
    Media,
    PipelineCall,
    class_for,
    diffusers_pipeline,
    flag_of,
    media_of,
    pipeline_for,
)
from .parts import part_dtypes
from .request import VALUES, GenerationRequest, size_like
from .schedulers import make_scheduler
from .sound import Sound
from .transformer import FreewheelTransformer
from .video import open_frames, open_image

__all__ = [
    "Generation",
    "Generator",
    "check_ahead",
    "check_recordable",
    "pipeline_class_of",
    "pipeline_of",
]

TRANSFORMERS = {"transformer", "transformer_2"}
"""Parts of a pipeline that a bundle takes the place of."""

ELSEWHERE = ("seed", "sampler", "flow_shift")
"""Of these, what goes into a pipeline by other ways than its call."""

OnStep = Callable[[int, int], None]


@dataclass(frozen=True)
class Generation:
    """What came out.

    Attributes:
        frames: uint8 [frames, height, width, 3], of pictures one frame each; none of sound, and
            none but on the rank that leads.
        latents: As the pipeline's callbacks see them after the last step, float32; None of a
            pipeline without callbacks.
        statistics: Decisions and seconds of the denoise loop.
        parameters: Of the policy, defaults filled in.
        seconds: Of ``encode`` (prompts and pictures, up to the transformer's first call), ``denoise``
            and ``decode``.
        resolved: The values used.
        sound: What can be heard, or None.
    """

    frames: NDArray[np.uint8]
    latents: torch.Tensor | None
    statistics: RunStatistics
    parameters: dict[str, Any]
    seconds: dict[str, float]
    resolved: dict[str, Any]
    sound: Sound | None = None

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
            f"bundle '{bundle.folder}'",
            "has two transformers, and a recorded run is of one",
            "record, calibrate and tune with a bundle of each transformer's folder",
        )


def pipeline_of(bundle: Bundle, model: Path | None = None) -> tuple[Path, dict[str, Any]]:
    """Return the folder with the rest of a bundle's pipeline, and its ``model_index.json``.

    Args:
        bundle: An open bundle.
        model: The folder, where the bundle has none.

    Raises:
        BundleError: there is no such folder.
    """
    entry = bundle.manifest.pipeline
    folder = model or (bundle.path(entry.folder) if entry.folder else Path(entry.source or ""))
    if not (folder / "model_index.json").is_file():
        raise BundleError(
            f"{bundle.folder}, 'pipeline'",
            f"is not to be found at '{folder}'",
            "give the checkpoint's diffusers folder with --model",
        )
    return folder, json.loads((folder / "model_index.json").read_text(encoding="utf-8"))


def pipeline_class_of(folder: Path, index: Mapping[str, Any]) -> Any:
    """Return the pipeline's class that ``model_index.json`` names.

    Raises:
        BundleError: diffusers has none of that name.
    """
    found: Any = diffusers_pipeline(index.get("_class_name"))
    if found is None:
        raise BundleError(
            str(folder / "model_index.json"),
            f"'_class_name' {index.get('_class_name')!r} is no pipeline of diffusers",
            "build the bundle again",
        )
    return found


def check_ahead(
    bundle: Bundle, request: GenerationRequest, out: Path, model: Path | None = None
) -> None:
    """Refuse what a bundle's pipeline can't take or ``out`` can't hold; nothing is loaded.

    Args:
        bundle: An open bundle.
        request: What is asked for; `GenerationRequest.check` has passed it.
        out: The file to be written.
        model: Diffusers folder with the rest of the pipeline, where the bundle has none.

    Raises:
        BundleError: the rest of the pipeline can't be found.
        RequestError: a value that its call has no parameter for, one that it can't do without, or a
            file of another kind.
    """
    folder, index = pipeline_of(bundle, model)
    own = pipeline_class_of(folder, index)
    call = PipelineCall(
        class_for(own, request.asked), embeds_guidance(bundle.manifest.inputs.values())
    )
    call.check_out(out)
    file = folder / "scheduler" / "scheduler_config.json"
    scheduler = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    _check_taken(request, call, bundle, scheduler, has_guider="guider" in index)


def _check_taken(
    request: GenerationRequest,
    call: PipelineCall,
    bundle: Bundle,
    scheduler: Mapping[str, Any],
    *,
    has_guider: bool,
) -> None:
    """Refuse what is asked for and nothing of the pipeline takes, and what is missing."""
    call.check_extra(request.extra)
    for name in ("prompt", "image", "video", "mask"):
        is_needed = call.wants(name) or (name == "prompt" and call.parameter(name) is not None)
        if is_needed and getattr(request, name) is None:
            how = '"what to show"' if name == "prompt" else "FILE"
            raise RequestError(
                name, f"is missing: {call.name} begins with one", f"give {flag_of(name)} {how}"
            )
    if len(bundle.manifest.experts) < 2 and request.guidance_scale_2 is not None:
        return  # has a message of its own
    elsewhere = {"sampler"} | ({"guidance_scale"} if has_guider else set())
    is_shifted = "flow_shift" in scheduler or "shift" in scheduler
    if "shift" in call.parameters or is_shifted or request.sampler:
        elsewhere.add("flow_shift")
    call.check_given([n for n in request.asked if n not in elsewhere])


class Generator:
    """A bundle with its pipeline around it, ready for any number of requests."""

    def __init__(
        self,
        bundle: Bundle,
        *,
        backend: str | None = None,
        loras: Sequence[str] = (),
        model: Path | None = None,
        options: DeviceOptions | None = None,
        ranks: Ranks | None = None,
        guidance_ranks: int | None = None,
    ) -> None:
        """Load text encoder, VAE and scheduler, and attach the bundle.

        Args:
            bundle: An open bundle.
            backend: Name of a backend; None takes the bundle's first.
            loras: ``[transformer_2=]FILE[:scale]``.
            model: Diffusers folder with the rest of the pipeline, where the bundle has none.
            options: How engines are driven: weights kept in host memory, CUDA graphs.
            ranks: Processes that share every run; None runs all here.
            guidance_ranks: As of `attach`.

        Raises:
            BundleError: the rest of the pipeline can't be found.
        """
        folder, index = pipeline_of(bundle, model)
        # NOTE: the pipeline's own class; DiffusionPipeline would load the transformer all the same.
        pipeline_class = pipeline_class_of(folder, index)
        # Some pipelines read the transformer's config as they are made.
        standing = {
            n: hollow_transformer(bundle) if index[n][0] else None
            for n in TRANSFORMERS & index.keys()
        }
        self.pipe: Any = pipeline_class.from_pretrained(
            folder,
            **standing,
            dtype=part_dtypes(folder),
            local_files_only=True,
            use_safetensors=True,  # a bundle from elsewhere may hold a pickle
        )
        self.pipe.register_modules(**dict.fromkeys(standing))
        self.pipe.set_progress_bar_config(disable=True)
        self._own: dict[str, Any] = {
            n: getattr(self.pipe, n, None) for n in ("scheduler", "guider")
        }
        self.bundle = bundle
        self.transformer: FreewheelTransformer = attach(
            self.pipe,
            bundle,
            "off",
            backend=backend,
            loras=loras,
            options=options,
            ranks=ranks,
            guidance_ranks=guidance_ranks,
        )
        self._ranks = ranks
        self._embeds_guidance = embeds_guidance(bundle.manifest.inputs.values())
        for expert in self.transformer.experts:
            expert.warn = lambda text: None  # callers read the statistics' warnings
        if options is not None and options.offload and self.pipe.model_cpu_offload_seq:
            # One part at a time; the transformer leaves where it is what offload left to it.
            self.pipe.enable_model_cpu_offload(device=self.transformer.device)
        else:
            self.pipe.to(self.transformer.device)

    def generate(
        self,
        request: GenerationRequest,
        *,
        recorder: Recorder | None = None,
        on_step: OnStep = lambda done, total: None,
    ) -> Generation:
        """Run one request.

        Args:
            request: Prompt and settings.
            recorder: Gets the trace.
            on_step: Called after each step with steps done and steps in all.

        Raises:
            RequestError: values that `GenerationRequest.check` refuses, or that the pipeline does
                not take, sizes that the model can't take, or an image missing.
        """
        request.check()
        experts = self.transformer.experts
        if recorder is not None and not recorder.across_experts:
            check_recordable(self.bundle)
        pipe, call = self._calling(request)
        image = self._image(request)
        values = self._checked_values(request, call, image)
        arguments = self._arguments(request, call, values, image)
        self.transformer.use(request.cache)
        for expert in experts:
            expert.recorder = recorder
        before = [expert.statistics for expert in experts]
        self._set_scheduler(request, pipe)
        self._set_guider(request, pipe, call)
        leads = self._ranks is None or self._ranks.leads
        loop = _Loop(self.steps(request), on_step)
        if "callback_on_step_end" in call.parameters:
            arguments["callback_on_step_end"] = loop.end_step
        if "output_type" in call.parameters:
            arguments["output_type"] = "np" if leads else "latent"
        hooks = [e.module.register_forward_pre_hook(loop.begin_call) for e in experts]
        for expert in experts:
            expert.on_call = loop.end_call
        asked = time.perf_counter()
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(values["seed"])  # of samplers that draw noise at every step
                answer = pipe(**arguments)
        finally:
            for expert, hook in zip(experts, hooks, strict=True):
                expert.on_call = None
                hook.remove()
        answered = time.perf_counter()
        seconds = {
            "encode": loop.began - asked,
            "denoise": loop.ended - loop.began,
            "decode": answered - loop.ended,
        }
        loop.end()
        if self._ranks is not None:
            self._ranks.tell({}, "ending the run")  # the first to end must not seem lost
        made = media_of(pipe, answer) if leads else Media(np.zeros((0, 0, 0, 3), np.uint8))
        for expert in experts:
            expert.session.model.save_caches()
        ran = [e.statistics for e, b in zip(experts, before, strict=True) if e.statistics is not b]
        statistics = RunStatistics.joined(ran)
        parameters = dict(self.transformer.session.resolved.parameters)
        return Generation(
            made.frames, loop.latents, statistics, parameters, seconds, values, made.sound
        )

    def values(self, request: GenerationRequest) -> dict[str, Any]:
        """Return the values that a request resolves to, as `Generation.resolved` has them.

        Raises:
            RequestError: as `generate` does.
        """
        request.check()
        _, call = self._calling(request)
        return self._checked_values(request, call, self._image(request))

    def timesteps(self, request: GenerationRequest) -> torch.Tensor | None:
        """Return the timesteps that a request will run through, [steps].

        None where the pipeline alone knows them: it sets noise levels of its own, shifts them by
        the size of the latents, or begins in their midst.

        Raises:
            RequestError: as `generate` does.
        """
        values = self.values(request)
        pipe, call = self._calling(request)
        self._set_scheduler(request, pipe)
        scheduler = pipe.scheduler
        if call.has_own_timesteps or scheduler.config.get("use_dynamic_shifting"):
            return None
        if "strength" in call.parameters:
            return None
        scheduler.set_timesteps(values["steps"])
        return torch.as_tensor(scheduler.timesteps)

    def frame_rate(self, request: GenerationRequest) -> float | None:
        """Return the frames a second that the pipeline makes its video for; None where it says nothing."""
        _, call = self._calling(request)
        found = request.extra.get("frame_rate", call.parameters.get("frame_rate"))
        return float(found) if isinstance(found, (int, float)) else None

    def steps(self, request: GenerationRequest) -> int | None:
        """Return how many steps will run; None where the run begins in their midst, which its pipeline counts."""
        _, call = self._calling(request)
        is_whole = request.strength is None and call.default("strength") is None
        steps: int | None = request.value("steps")
        return steps if is_whole else None

    def _calling(self, request: GenerationRequest) -> tuple[Any, PipelineCall]:
        """Return the pipeline that takes what the request begins with, and its call."""
        pipe = pipeline_for(self.pipe, request.asked)
        _check_strides(self.pipe, pipe)
        if pipe is not self.pipe:
            pipe.set_progress_bar_config(disable=True)
        return pipe, PipelineCall(type(pipe), self._embeds_guidance)

    def _arguments(
        self,
        request: GenerationRequest,
        call: PipelineCall,
        values: Mapping[str, Any],
        image: Image.Image | None,
    ) -> dict[str, Any]:
        """Return what the pipeline is called with, by its own names."""
        given: dict[str, Any] = {
            "prompt": request.prompt,
            "negative_prompt": request.negative_prompt,
            "strength": request.strength,
            **values,
        }
        if call.default("text_tokens") is not None:
            given["text_tokens"] = request.value("text_tokens")
        if request.flow_shift is not None and "shift" in call.parameters:
            given["shift"] = request.flow_shift
        if image is not None:
            # Filled and cut, as other resizing would stretch it; a reference keeps its own size.
            is_begun_with = call.makes_video or call.parameter("strength") is not None
            size = (values.get("width", image.width), values.get("height", image.height))
            given["image"] = ImageOps.fit(image, size) if is_begun_with else image
        if request.video is not None:
            given["video"] = open_frames(request.video, "--video")
        if request.mask is not None:
            masks = [frame.convert("L") for frame in open_frames(request.mask, "--mask")]
            if call.makes_video and len(masks) == 1:
                masks *= len(given.get("video", ())) or values.get("frames", 1)
            given["mask"] = masks if call.makes_video else masks[0]
        taken = {n: call.parameter(n) for n, v in given.items() if v is not None}
        arguments = {name: given[n] for n, name in taken.items() if name is not None}
        generator = torch.Generator().manual_seed(values["seed"])
        return {**arguments, "generator": generator, **request.extra}

    def _set_scheduler(self, request: GenerationRequest, pipe: Any) -> None:
        shift, name = request.value("flow_shift"), request.value("sampler")
        own = self._own["scheduler"]
        if name is not None:
            is_own = name in SAMPLERS and SAMPLERS[name] == type(own).__name__ and name != DISTILLED
            pipe.scheduler = make_scheduler(name, shift, dict(own.config) if is_own else None)
            return
        key = next((k for k in ("flow_shift", "shift") if k in own.config), None)
        if key is not None and own.config[key] != shift:
            # Shifting by the latents' size takes no account of a shift that is asked for.
            fixed = {k: False for k in ("use_dynamic_shifting",) if k in own.config}
            own = type(own).from_config(own.config, **{key: shift}, **fixed)
        pipe.scheduler = own

    def _set_guider(self, request: GenerationRequest, pipe: Any, call: PipelineCall) -> None:
        """Give the guidance scale to the part that has it, where the call takes none."""
        if self._own["guider"] is None:
            return
        scale, pipe.guider = request.guidance_scale, self._own["guider"]
        if scale is not None and call.parameter("guidance_scale") is None:
            pipe.guider = pipe.guider.new(guidance_scale=scale)

    def _checked_values(
        self, request: GenerationRequest, call: PipelineCall, image: Image.Image | None
    ) -> dict[str, Any]:
        scheduler, guider = self._own["scheduler"].config, self._own["guider"]
        _check_taken(request, call, self.bundle, scheduler, has_guider=guider is not None)
        taken = {n for n in VALUES if call.parameter(n) is not None}
        values = {
            n: v
            for n in VALUES
            if (n in taken or n in ELSEWHERE) and (v := request.value(n)) is not None
        }
        if "guidance_scale_2" in values and len(self.bundle.manifest.experts) < 2:
            raise RequestError(
                f"--guidance-2 {values['guidance_scale_2']}",
                "is given, and the bundle has one expert",
                "leave it out, or give one 'sample_guide_scale'",
            )
        values |= call.without_parts
        manifest, scale = self.bundle.manifest, self.bundle.manifest.latent_scale
        sizes = {n for n in ("height", "width", "frames") if n in values}
        if (
            image is not None
            and "height" in sizes
            and request.height is None
            and request.width is None
        ):
            area = values["height"] * values["width"]
            patch = max(divisor(manifest.dims, n) for n in ("height", "width"))
            values["height"], values["width"] = size_like(image, area, scale.pixels * patch)
        check_video({n: values[n] for n in sizes}, scale, manifest.dims)
        return values

    def _image(self, request: GenerationRequest) -> Image.Image | None:
        return None if request.image is None else open_image(request.image)


def _check_strides(own: Any, pipe: Any) -> None:
    """Refuse a pipeline that makes other strides of a VAE than the bundle's pipeline does.

    diffusers' video-to-video pipeline of Wan takes each level of the VAE for one that halves a frame.

    Raises:
        RequestError: they differ.
    """
    for name in ("vae_scale_factor_spatial", "vae_scale_factor_temporal"):
        usual, found = getattr(own, name, None), getattr(pipe, name, None)
        if None not in (usual, found) and usual != found:
            raise RequestError(
                f"{type(pipe).__name__}.{name}",
                f"is {found}, and {type(own).__name__} has {usual} of the same VAE",
                "this VAE does not serve that pipeline of diffusers; start from noise",
            )


class _Loop:
    """Follows a run from the calls of its transformer and the pipeline's callback.

    Attributes:
        began: When the transformer was first called.
        ended: When the last step ended, so far.
        latents: After the last step, so far.
    """

    def __init__(self, total: int | None, on_step: OnStep) -> None:
        """Begin; without a total it is the steps that the transformer's session was begun with."""
        self.began = self.ended = time.perf_counter()
        self.latents: torch.Tensor | None = None
        self._total, self._on_step = total, on_step
        self._done = 0
        self._has_begun = False
        self._step: tuple[int, int] | None = None

    def begin_call(self, module: torch.nn.Module, given: tuple[Any, ...]) -> None:
        """Note when the first call of the transformer comes."""
        if not self._has_begun:
            self._has_begun, self.began = True, time.perf_counter()

    def end_call(self, session: Any, step_index: int) -> None:
        """Count the step before, where this call is the first of another."""
        self.ended = time.perf_counter()
        if self._total is None:
            self._total = session.steps
        if self._step is not None and self._step != (id(session), step_index):
            self._done += 1
            self._on_step(self._done, self._total)
        self._step = (id(session), step_index)

    def end_step(self, pipe: Any, step: int, timestep: Any, tensors: Any) -> Any:
        """Take the latents that the sampler made."""
        self.ended = time.perf_counter()
        self.latents = tensors.get("latents")
        return tensors

    def end(self) -> None:
        """Count the last step."""
        if self._step is not None and self._total is not None:
            self._on_step(self._done + 1, self._total)
