# SPDX-License-Identifier: Apache-2.0
"""Watch what a pipeline gives its transformer, with a stand-in for it that computes nothing."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ...core.errors import CheckpointError, RequestError
from ...runtime.pipeline.call import SECONDS
from .transformer import on_meta

__all__ = ["Sizes", "WatchedRun", "stand_in", "usual_calls", "watch"]

STEPS = 3

Sizes = Mapping[str, Mapping[str, Any]]
"""Size → arguments with which a pipeline is called for that size alone to differ."""

FRAMES_KEYS = ("num_frames", "frames", "video_length")
COUNT_KEYS = ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt")

LONGER = 8
"""How often a longer text says a prompt: some pipelines round a text's length up to 16."""

UNGUIDED = ("guidance_scale", "true_cfg_scale")
OFF = ("use_resolution_binning", "clean_caption")


def stand_in(model_class: Any, config: Mapping[str, Any]) -> nn.Module:
    """Return a transformer without weights, of the class that a pipeline expects."""
    module: nn.Module = on_meta(model_class, config)
    anchor = nn.Parameter(torch.zeros(0), requires_grad=False)  # tells a device and a dtype
    module._parameters = {"anchor": anchor, **module._parameters}
    return module


def usual_calls(pipe: Any, text: str) -> tuple[dict[str, Any], Sizes]:
    """Return what a pipeline is called with to be watched: the first call, and one for each size.

    Args:
        pipe: A diffusers pipeline with its text encoders.
        text: A prompt.
    """
    taken = inspect.signature(pipe.__call__).parameters
    first: dict[str, Any] = {"prompt": text}
    first |= dict.fromkeys((k for k in UNGUIDED if k in taken), 1.0)
    first |= dict.fromkeys((k for k in OFF if k in taken), False)
    others: dict[str, dict[str, Any]] = {}
    if "prompt" in taken and "list" in str(taken["prompt"].annotation).lower():
        others["batch"] = {"prompt": [text, text]}
    sizes: dict[str, tuple[str, float, float]] = {
        "height": ("height", 128, 256),
        "width": ("width", 192, 320),
    }
    sizes |= dict.fromkeys(FRAMES_KEYS, ("frames", 9, 17))
    sizes |= dict.fromkeys(SECONDS, ("frames", 10.0, 20.0))
    for key in (k for k in sizes if k in taken):
        size, first[key], other = sizes[key]
        others[size] = {key: other}
    for key in (k for k in COUNT_KEYS if k in taken):
        others.setdefault("batch", {key: 2})  # some pipelines take it, and make one
    others["text_tokens"] = {"prompt": ", and ".join([text] * LONGER)}
    if "max_sequence_length" in taken:
        first["max_sequence_length"], others["text_tokens"]["max_sequence_length"] = 32, 48
    return first, others


@dataclass(frozen=True)
class WatchedRun:
    """What a pipeline gave its transformer.

    Attributes:
        arguments: Of each call.
        leaves: The same, by path.
        timesteps: The scheduler's.
        turned: Whether the scheduler gets the answers with the other sign.
    """

    arguments: list[dict[str, Any]]
    leaves: list[dict[tuple[Any, ...], Any]]
    timesteps: Tensor
    turned: bool


def watch(pipe: Any, arguments: Mapping[str, Any]) -> WatchedRun:
    """Call a pipeline whose transformer is a `stand_in`, and return what that is given.

    Raises:
        RequestError: the pipeline can't be called so.
        CheckpointError: it does not call its transformer as often in every step.
    """
    calls: list[dict[str, Any]] = []
    signature = inspect.signature(type(pipe.transformer).forward)
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": STEPS, "output_type": "latent", "generator": generator}
    stepped: list[Tensor] = []
    scheduler_step = pipe.scheduler.step

    def step(model_output: Tensor, *values: Any, **named: Any) -> Any:
        stepped.append(model_output)
        return scheduler_step(model_output, *values, **named)

    with (
        _answered(pipe.transformer, signature, calls) as answers,
        mock.patch.object(pipe.scheduler, "step", step),
    ):
        try:
            pipe(**{**options, **arguments})
        except Exception as error:
            raise RequestError(
                f"{type(pipe).__name__}",
                f"can't be called with {_brief(arguments)}: {error}",
                "write a row for the model (docs/how-to/add-a-family.md)",
            ) from error
    if not calls or len(calls) % STEPS:
        raise CheckpointError(
            f"{type(pipe).__name__}",
            f"calls its transformer {len(calls)} times in {STEPS} steps",
            "write a row for the model (docs/how-to/add-a-family.md)",
        )
    calls = calls[:: len(calls) // STEPS]  # the first branch of each step
    leaves = [dict(pytree.tree_flatten_with_path(call)[0]) for call in calls]
    turned = bool(stepped) and _is_turned(answers[0], stepped[0])
    return WatchedRun(calls, leaves, torch.as_tensor(pipe.scheduler.timesteps).float(), turned)


def _is_turned(answer: Tensor, stepped: Tensor) -> bool:
    """Say whether a scheduler got an answer with the other sign, without its variance."""
    if answer.ndim == stepped.ndim > 1:
        answer = answer[:, : stepped.shape[1]]
    return torch.equal(-answer, stepped.to(answer))


@contextmanager
def _answered(
    transformer: Any, signature: inspect.Signature, calls: list[dict[str, Any]]
) -> Iterator[list[Tensor]]:
    """Let a transformer keep what it is given, and return noise; gives that noise."""
    config = transformer.config
    answers: list[Tensor] = []

    def forward(*values: Any, **named: Any) -> Any:
        given = dict(signature.bind(transformer, *values, **named).arguments)
        calls.append(
            {
                name: pytree.tree_map(lambda leaf: _copied(leaf), value)
                for name, value in list(given.items())[1:]
                if name != "return_dict" and _is_given(value)
            }
        )
        latents = next(leaf for leaf in pytree.tree_leaves(calls[-1]) if isinstance(leaf, Tensor))
        taken, made = config.get("in_channels"), config.get("out_channels")
        own = getattr(transformer, "out_channels", None)  # twice as many with a variance
        made = made or (own if own in (taken, 2 * (taken or 0)) else taken)
        shape = list(latents.shape)
        if (
            made and taken in shape[1:] and latents.ndim > 3
        ):  # tokens have as many channels on either side
            shape[shape.index(taken, 1)] = made
        answers.append(torch.randn(shape, dtype=latents.dtype))
        if given.get("return_dict", True):
            return Transformer2DModelOutput(answers[-1])
        return (answers[-1],)

    own = transformer.forward
    transformer.forward = forward
    try:
        yield answers
    finally:
        transformer.forward = own


def _copied(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


def _is_given(value: Any) -> bool:
    return any(leaf is not None for leaf in pytree.tree_leaves(value))


def _brief(arguments: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name}={list(v.shape) if isinstance(v, Tensor) else v!r}" for name, v in arguments.items()
    )
