# SPDX-License-Identifier: Apache-2.0
"""What each of two processes runs: a pipeline in one process and over two, with every policy."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    WanImageToVideoPipeline,
    WanPipeline,
)
from PIL import Image
from torch import Tensor

import freewheel
from freewheel.bundle.reader import Bundle
from freewheel.policies.setting import CacheSetting, GuardSetting

STEPS = 6

Call = tuple[Any, dict[str, Any]]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def wan(folder: Path) -> Call:
    pipe = WanPipeline.from_pretrained(folder, dtype=torch.float32)
    size = {"height": 32, "width": 48, "num_frames": 5, "max_sequence_length": 16}
    return pipe, {"prompt": "a red circle", "negative_prompt": "", "guidance_scale": 3.0, **size}


def image_to_video(folder: Path) -> Call:
    pipe = WanImageToVideoPipeline.from_pretrained(folder, dtype=torch.float32)
    return pipe, {
        "image": Image.new("RGB", (48, 32), "red"),
        "prompt": "a circle",
        "negative_prompt": "",
        "guidance_scale": 5.0,
        "height": 32,
        "width": 48,
        "num_frames": 5,
    }


def qwen_image(folder: Path) -> Call:
    model = QwenImageTransformer2DModel.from_pretrained(folder)
    width = model.config.joint_attention_dim
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = QwenImagePipeline(scheduler, None, None, None, model)  # type: ignore[arg-type]  # parts not needed
    return pipe, {
        "prompt_embeds": drawn(1, 6, width),
        "negative_prompt_embeds": drawn(1, 6, width, seed=1),
        "prompt_embeds_mask": torch.ones(1, 6, dtype=torch.int64),
        "negative_prompt_embeds_mask": torch.tensor([[1, 1, 1, 1, 0, 0]]),
        "true_cfg_scale": 3.0,
        "height": 64,
        "width": 96,
    }


def hunyuan_video(folder: Path) -> Call:
    model = HunyuanVideoTransformer3DModel.from_pretrained(folder)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    pipe = HunyuanVideoPipeline(None, None, model, None, scheduler, None, None)  # type: ignore[arg-type]  # parts not needed
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
    width, pooled = model.config.text_embed_dim, model.config.pooled_projection_dim
    return pipe, {
        "prompt_embeds": drawn(1, 6, width),
        "negative_prompt_embeds": drawn(1, 6, width, seed=1),
        "pooled_prompt_embeds": drawn(1, pooled),
        "negative_pooled_prompt_embeds": drawn(1, pooled, seed=1),
        "prompt_attention_mask": mask,
        "negative_prompt_attention_mask": mask,
        "true_cfg_scale": 2.0,
        "height": 32,
        "width": 48,
        "num_frames": 9,
    }


def flux(folder: Path) -> Call:
    model = FluxTransformer2DModel.from_pretrained(folder)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = FluxPipeline(scheduler, None, None, None, None, None, model)  # type: ignore[arg-type]  # parts not needed
    return pipe, {
        "prompt_embeds": drawn(1, 6, model.config.joint_attention_dim),
        "pooled_prompt_embeds": drawn(1, model.config.pooled_projection_dim),
        "height": 48,
        "width": 64,
        "guidance_scale": 3.5,
    }


PIPELINES = {f.__name__: f for f in (wan, image_to_video, qwen_image, hunyuan_video, flux)}


def settings(bundle: Bundle) -> dict[str, CacheSetting]:
    """Return a setting of every policy, lax enough to reuse."""
    found = {}
    for policy, entry in bundle.manifest.policies.items():
        parameters: dict[str, Any] = {}
        if "threshold" in entry.spec.parameters:
            parameters = {"threshold": 100.0}
        if policy == "solved":
            parameters = {"steps": STEPS // 2}
        if policy == "spectrum":
            parameters = {"warmup": 1}
        guard = GuardSetting(first_exact=1, last_exact=1)
        found[policy] = CacheSetting(policy=policy, parameters=parameters, guard=guard)
    return found


def latents(pipe: Any, arguments: dict[str, Any]) -> Tensor:
    seed = torch.Generator().manual_seed(3)
    found: Tensor = pipe(
        **arguments,
        num_inference_steps=STEPS,
        generator=seed,
        output_type="latent",
        return_dict=False,
    )[0]
    return found


def decided(transformer: Any) -> dict[str, Any]:
    branches = transformer.statistics.branches
    return {n: [branches[n].computed, branches[n].distance, branches[n].mix] for n in branches}


def main(kind: str, checkpoint: Path, folder: Path, out: Path, only: str) -> None:
    """Run everything on this rank, and write what it saw."""
    torch.set_num_threads(1)
    ranks = freewheel.join_ranks()
    bundle = Bundle(folder)
    pipe, arguments = PIPELINES[kind](checkpoint)
    pipe.set_progress_bar_config(disable=True)
    chosen = {n: s for n, s in settings(bundle).items() if not only or n in only.split(",")}
    expected: dict[str, Tensor] = {}
    decisions: dict[str, Any] = {}
    with freewheel.attached(pipe, bundle, "off", backend="onnxruntime") as alone:
        for name, setting in chosen.items():
            alone.setting = setting
            expected[name] = latents(pipe, arguments)
            decisions[name] = decided(alone)
    seen: dict[str, Any] = {}
    with freewheel.attached(pipe, bundle, "off", backend="onnxruntime", ranks=ranks) as shared:
        for name, setting in chosen.items():
            shared.setting = setting
            ran: list[str] = []
            step = shared.session.step

            def noted(branch: str, *given: Any, step: Any = step, ran: Any = ran) -> Tensor:
                ran.append(branch)
                return step(branch, *given)

            shared.session.step = noted  # type: ignore[method-assign]  # watched
            found = latents(pipe, arguments)
            shared.session.step = step  # type: ignore[method-assign]  # watched
            apart = (found - expected[name]).norm() / expected[name].norm()
            counts = shared.exchange
            assert counts is not None, "over ranks"
            seen[name] = {
                "apart": float(apart),
                "as_alone": decided(shared) == decisions[name],
                "ran": sorted(set(ran)),
                "computed": {n: b.computed for n, b in shared.statistics.branches.items()},
                "exchange": counts.as_dict(),
                "output_bytes": 4 * found.numel(),
                "warnings": shared.rank_warnings(),
            }
    (out / f"rank{ranks.rank}.json").write_text(json.dumps(seen))
    ranks.leave()


if __name__ == "__main__":
    kind, *paths, only = sys.argv[1:]
    main(kind, *(Path(a) for a in paths), only)
