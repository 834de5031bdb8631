# SPDX-License-Identifier: Apache-2.0
"""Distil the shapes_wan checkpoint to four steps without guidance, as a LoRA, on a CPU.

The teacher runs from noise with guidance, several solver steps between two timesteps of a step
list, and its latents at the listed timesteps are kept. The student runs through the list by Euler,
one call a step, and at each step is trained to arrive where the teacher is at the next listed
timestep, from where its own earlier steps have taken it. No clips are needed.

Stages run in order: ``trajectories``, ``student``, ``export``, and ``merge`` for who wants a whole
model. Each may be killed at any time and run again.

Reference: Salimans & Ho 2022, Progressive Distillation, arXiv 2202.00512, algorithm 2 (one student
step for several of the teacher); Meng et al. 2022, arXiv 2210.03142, section 3.1 (guidance in the
student).

Differs: The timesteps are fixed, so that one round goes from the teacher to four steps. Latents are
the teacher's and the student's own rather than noised data. Guidance is one fixed scale.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from architecture import LATENT_CHANNELS, TEXT_TOKENS
from clips import training_specs
from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from generate import load_pipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from train import (
    Report,
    SaveEvery,
    Threads,
    linear_tail,
    prepare_cpu,
    report_progress,
    save_folder,
    set_learning_rate,
    take_step,
)
from training_state import TrainingState

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False)

HERE = Path(__file__).parent
STEP_LIST = (1000, 750, 500, 250)
"""Timesteps before the shift, as distilled checkpoints of Wan use them."""
SHIFT = 5.0
GUIDANCE_SCALE = 3.0
LATENT_SHAPE = (LATENT_CHANNELS, 5, 12, 12)
SHARD_TRAJECTORIES = 16
LORA_TARGETS = (
    r"blocks\.\d+\.attn\d\.to_(q|k|v|out\.0)|blocks\.\d+\.ffn\.net\.(0\.proj|2)"
    r"|condition_embedder\.(time_proj|time_embedder\.linear_\d|text_embedder\.linear_\d)|proj_out"
)

WorkDir = Annotated[Path, typer.Option(help="Folder that holds every stage's state and results.")]
Model = Annotated[Path, typer.Option(help="The teacher, in diffusers layout.")]


def listed_sigmas(substeps: int = 1) -> list[float]:
    """List the noise levels of a run through the step list, each step divided evenly.

    Returns:
        Falling from 1 to 0, ``substeps`` for each listed timestep and the final 0.
    """
    stops = [*STEP_LIST, 0]
    levels = [
        (stops[i] + (stops[i + 1] - stops[i]) * j / substeps) / 1000
        for i in range(len(STEP_LIST))
        for j in range(substeps)
    ]
    return [SHIFT * level / (1 + (SHIFT - 1) * level) for level in [*levels, 0.0]]


@torch.no_grad()
def run_teacher(
    transformer: nn.Module, noise: Tensor, text: Tensor, empty_text: Tensor, *, substeps: int
) -> Tensor:
    """Run the teacher with guidance and keep its latents at the listed timesteps.

    Args:
        transformer: The teacher.
        noise: [batch, channels, frames, height, width], float32.
        text: [batch, text_tokens, channels], of the captions.
        empty_text: As ``text``, of the empty caption.
        substeps: UniPC steps between two listed timesteps.

    Returns:
        [batch, 5, channels, frames, height, width], float32: the noise first, the clip last.
    """
    solver = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    # Shifted already, so the solver's own shift stays 1. Its annotation says list; it multiplies.
    solver.set_timesteps(sigmas=np.array(listed_sigmas(substeps)[:-1]))
    latents, kept = noise, [noise]
    both_texts = torch.cat([text, empty_text])
    for index, timestep in enumerate(solver.timesteps):
        timesteps = timestep.expand(2 * len(latents))
        both = transformer(torch.cat([latents, latents]), timesteps, both_texts, return_dict=False)
        cond, uncond = both[0].float().chunk(2)
        velocity = uncond + GUIDANCE_SCALE * (cond - uncond)
        latents = solver.step(velocity, timestep, latents, return_dict=False)[0]
        if (index + 1) % substeps == 0:
            kept.append(latents)
    return torch.stack(kept, dim=1)


@torch.no_grad()
def encode_captions(pipeline: WanPipeline, captions: Sequence[str]) -> Tensor:
    """Encode prompts as the pipeline does: [captions, TEXT_TOKENS, channels], float32."""
    text, _ = pipeline.encode_prompt(
        list(captions), do_classifier_free_guidance=False, max_sequence_length=TEXT_TOKENS
    )
    return text.float()


def make_trajectories(
    model: Path, work_dir: Path, *, count: int, substeps: int, autocast: bool
) -> None:
    """Write the teacher's trajectories, shard by shard, skipping shards that are there.

    A shard holds ``latents``, as ``run_teacher`` returns them, and ``text``. Captions are those of
    the first training clips, so that held-out ones stay held out.
    """
    folder = work_dir / "trajectories"
    folder.mkdir(parents=True, exist_ok=True)
    pipeline = load_pipeline(model)
    captions = [str(spec.caption) for spec in training_specs(count)]
    empty = encode_captions(pipeline, [""])
    for first in range(0, count, SHARD_TRAJECTORIES):
        path = folder / f"{first:06d}.safetensors"
        if path.exists():
            continue
        part = captions[first : first + SHARD_TRAJECTORIES]
        text = encode_captions(pipeline, part)
        noise = torch.randn(
            len(part), *LATENT_SHAPE, generator=torch.Generator().manual_seed(first)
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            latents = run_teacher(
                pipeline.transformer, noise, text, empty.expand_as(text), substeps=substeps
            )
        partial = path.with_name(path.name + ".partial")
        save_file({"latents": latents.contiguous(), "text": text}, partial)
        partial.replace(path)
        print(f"ran {first + len(part)}/{count} trajectories", file=sys.stderr, flush=True)


def load_trajectories(work_dir: Path) -> tuple[Tensor, Tensor]:
    """Read the shards of ``make_trajectories``: latents and text."""
    shards = [load_file(path) for path in sorted((work_dir / "trajectories").glob("*.safetensors"))]
    return (
        torch.cat([shard["latents"] for shard in shards]),
        torch.cat([shard["text"] for shard in shards]),
    )


def make_student(model: Path, *, rank: int) -> tuple[WanTransformer3DModel, nn.ModuleDict]:
    """Load the teacher's transformer with a LoRA that changes nothing yet.

    Returns:
        The transformer, and the LoRA's matrices by the names of the layers.
    """
    torch.manual_seed(0)
    transformer = WanTransformer3DModel.from_pretrained(model / "transformer").float().train()
    transformer.requires_grad_(False)
    transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=LORA_TARGETS))
    matrices = nn.ModuleDict(
        {
            name.replace(".", "/"): module
            for name, module in transformer.named_modules()
            if name.endswith((".lora_A", ".lora_B"))
        }
    )
    return transformer, matrices


def step_losses(
    transformer: nn.Module, trajectories: Tensor, text: Tensor, *, autocast: bool
) -> Tensor:
    """Run the student through the step list and measure each step's velocity.

    A step is asked for the velocity that leads to the teacher's next latents from the latents that
    the student has reached, through which no gradient flows back to earlier steps.

    Args:
        transformer: The student.
        trajectories: As ``run_teacher`` returns them.
        text: [batch, text_tokens, channels].
        autocast: Compute matrix products in bfloat16.

    Returns:
        Mean squared error of the velocity at each listed timestep.
    """
    sigmas = listed_sigmas()
    latents, losses = trajectories[:, 0], []
    for index in range(len(STEP_LIST)):
        span = sigmas[index + 1] - sigmas[index]
        wanted = (trajectories[:, index + 1] - latents) / span
        timesteps = torch.full((len(latents),), sigmas[index] * 1000)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            velocity = transformer(latents, timesteps, text, return_dict=False)[0].float()
        losses.append(F.mse_loss(velocity, wanted))
        latents = latents + span * velocity.detach()
    return torch.stack(losses)


def train_student(
    model: Path,
    work_dir: Path,
    *,
    iterations: int,
    batch: int,
    rank: int,
    learning_rate: float,
    save_every: int,
    autocast: bool = True,
    report: Report = report_progress,
) -> TrainingState:
    """Train the LoRA on the trajectories, from the last save where there is one."""
    settings = {
        "iterations": iterations,
        "batch": batch,
        "rank": rank,
        "learning_rate": learning_rate,
        "autocast": autocast,
    }
    transformer, matrices = make_student(model, rank=rank)
    state = TrainingState(
        matrices,
        torch.optim.AdamW(matrices.parameters(), betas=(0.9, 0.99), weight_decay=0.0),
        torch.Generator().manual_seed(13),
        ema=[parameter.detach().clone() for parameter in matrices.parameters()],
    )
    state.restore(work_dir / "student.pt", settings)
    trajectories, text = load_trajectories(work_dir)
    while state.iteration < iterations:
        rate = learning_rate * min(1, (state.iteration + 1) / 20)
        progress = state.iteration / iterations
        set_learning_rate(state.optimizer, rate * linear_tail(progress, start=0.5))
        index = torch.randint(len(trajectories), (batch,), generator=state.generator)
        losses = step_losses(transformer, trajectories[index], text[index], autocast=autocast)
        take_step(state, losses.mean(), clip_norm=1.0)
        if state.iteration % save_every == 0 or state.iteration == iterations:
            state.save(work_dir / "student.pt", settings)
        report(state.iteration, iterations, losses.mean().item())
    return state


@app.command()
def trajectories(
    work_dir: WorkDir = Path("runs/shapes_wan_4step"),
    model: Model = HERE,
    count: Annotated[int, typer.Option(min=1, help="Trajectories, each of its own noise.")] = 96,
    substeps: Annotated[int, typer.Option(min=1, help="Teacher's steps in a step.")] = 3,
    autocast: Annotated[bool, typer.Option(help="Matrix products in bfloat16.")] = True,
    threads: Threads = 2,
) -> None:
    """Run the teacher once from each noise, so that the student's training need not.

    Example: python models/shapes_wan/distil.py trajectories --work-dir runs/shapes_wan_4step
    """
    prepare_cpu(threads)
    make_trajectories(model, work_dir, count=count, substeps=substeps, autocast=autocast)


@app.command()
def student(
    work_dir: WorkDir = Path("runs/shapes_wan_4step"),
    model: Model = HERE,
    iterations: Annotated[int, typer.Option(min=1)] = 85,
    batch: Annotated[int, typer.Option(min=1, help="Trajectories an iteration.")] = 8,
    rank: Annotated[int, typer.Option(min=1, help="Of the LoRA.")] = 32,
    learning_rate: float = 2e-3,
    autocast: Annotated[bool, typer.Option(help="Matrix products in bfloat16.")] = True,
    save_every: SaveEvery = 10,
    threads: Threads = 2,
) -> None:
    """Train the LoRA on the trajectories.

    Example: python models/shapes_wan/distil.py student --work-dir runs/shapes_wan_4step
    """
    prepare_cpu(threads)
    train_student(
        model,
        work_dir,
        iterations=iterations,
        batch=batch,
        rank=rank,
        learning_rate=learning_rate,
        save_every=save_every,
        autocast=autocast,
    )


@app.command()
def export(
    work_dir: WorkDir = Path("runs/shapes_wan_4step"),
    model: Model = HERE,
    out: Annotated[
        Path | None, typer.Option(help="LoRA to write; default WORK_DIR/four_steps.safetensors.")
    ] = None,
) -> None:
    """Write the averaged LoRA in float16 safetensors, as diffusers' pipelines load it.

    Example: python models/shapes_wan/distil.py export --work-dir runs/shapes_wan_4step
    """
    content = torch.load(work_dir / "student.pt", weights_only=True)
    transformer, matrices = make_student(model, rank=content["settings"]["rank"])
    with torch.no_grad():
        for parameter, average in zip(matrices.parameters(), content["ema"], strict=True):
            parameter.copy_(average)
    layers = {name: t.half() for name, t in get_peft_model_state_dict(transformer).items()}
    target = out or work_dir / "four_steps.safetensors"
    WanPipeline.save_lora_weights(
        target.parent, transformer_lora_layers=layers, weight_name=target.name
    )
    print(target)


@app.command()
def merge(
    lora: Annotated[Path, typer.Argument(help="What export wrote.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    model: Model = HERE,
) -> None:
    """Write the model with a LoRA merged into it, as a diffusers folder in float16.

    Example: python models/shapes_wan/distil.py merge LORA --out out/four_steps
    """
    pipeline = load_pipeline(model)
    pipeline.load_lora_weights(lora.parent, weight_name=lora.name)
    pipeline.fuse_lora(components=["transformer"])
    pipeline.unload_lora_weights()
    save_folder(out, pipeline.to(torch.float16).save_pretrained)
    print(out)


if __name__ == "__main__":
    app()
