# SPDX-License-Identifier: Apache-2.0
"""Train the shapes_wan checkpoint from nothing, or onwards from a finished one, on a CPU.

Stages run in order: ``vae``, ``latents``, ``transformer``, ``export``; ``adopt`` replaces ``vae``
and gives ``transformer`` its first weights. Each stage may be killed at any time and run again: it
goes on from its last save and ends with the same weights as a run that was never stopped.
"""

import math
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from architecture import (
    LATENT_CHANNELS,
    TEXT_TOKENS,
    make_scheduler,
    make_text_encoder,
    make_tokenizer,
    make_transformer,
    make_vae,
)
from clips import TRAINING_CLIPS, ClipSpec, render, sample, training_specs
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from training_state import TrainingState
from transformers import UMT5EncoderModel

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False)

SHARD_CLIPS = 40
LONG_TEXT_TOKENS = 512  # what the pipeline pads prompts to unless told otherwise
EMPTY_CAPTION_SHARE = 0.1
KL_SHARE = 1e-3

Report = Callable[[int, int, float], None]
WorkDir = Annotated[Path, typer.Option(help="Folder that holds every stage's state and results.")]
SaveEvery = Annotated[int, typer.Option(min=1, help="Iterations between saves.")]
Threads = Annotated[int, typer.Option(min=1, help="CPU threads.")]


def report_progress(iteration: int, total: int, loss: float) -> None:
    """Print every tenth iteration's loss to stderr."""
    if iteration % 10 == 0:
        stamp = time.strftime("%H:%M:%S")
        print(f"{stamp} iteration {iteration}/{total} loss {loss:.4f}", file=sys.stderr, flush=True)


def prepare_cpu(threads: int) -> None:
    """Set the thread count and flush denormals, which make CPU training five times slower."""
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)


def cosine_tail(progress: float, *, start: float) -> float:
    """Hold 1 until ``start``, then fall along a half cosine to 0.02 at progress 1."""
    if progress < start:
        return 1.0
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (progress - start) / (1 - start)))


def linear_tail(progress: float, *, start: float) -> float:
    """Hold 1 until ``start``, then fall linearly to 0.03 at progress 1."""
    return 1.0 if progress < start else max(0.03, (1 - progress) / (1 - start))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every parameter group the same learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def save_folder(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a folder, and put it in place only when it is complete."""
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write(partial)
    if path.exists():
        shutil.rmtree(path)
    partial.replace(path)


def draw_vae_batch(
    phase: int, iteration: int, progress: float, generator: torch.Generator
) -> Tensor:
    """Draw clips for one iteration of the autoencoder.

    Phase 1 goes from single frames to 5 and 9 frames. Phase 2 shows whole clips of 17 frames,
    without which colours drift over time. Most batches are 64 pixels wide, the others 96.

    Returns:
        [batch, 3, frames, size, size], float32, in [-1, 1].
    """
    if phase == 1:
        short = progress < 0.75 or iteration % 2 == 1
        frames, batch = (1, 16) if progress < 0.3 else (5, 6) if short else (9, 5)
        size = 64 if iteration % 5 else 96
    else:
        frames, batch = (17, 2) if iteration % 3 else (9, 4)
        size = 64 if iteration % 4 else 96
    clips = [sample(generator, frames=frames, size=size)[0] for _ in range(batch)]
    return torch.stack(clips)


def vae_loss(vae: nn.Module, clips: Tensor, generator: torch.Generator) -> Tensor:
    """Reconstruct clips: L1 + 2·L2 + a little KL, which keeps the latents bounded."""
    posterior = vae.encode(clips).latent_dist
    latents = posterior.sample(generator=generator)
    decoded = vae.decode(latents).sample
    kl = posterior.kl().mean() / latents[0].numel()
    return F.l1_loss(decoded, clips) + 2 * F.mse_loss(decoded, clips) + KL_SHARE * kl


def train_vae_phase(
    vae: AutoencoderKLWan,
    state_path: Path,
    *,
    phase: int,
    iterations: int,
    save_every: int,
    learning_rate: float,
    report: Report = report_progress,
) -> None:
    """Train the autoencoder in place through one phase, from the last save where there is one."""
    warmup, tail, beta2 = (50, 0.5, 0.99) if phase == 1 else (60, 0.3, 0.98)
    settings = {"phase": phase, "iterations": iterations, "learning_rate": learning_rate}
    state = TrainingState(
        nn.ModuleDict({"vae": vae.train()}),
        torch.optim.AdamW(vae.parameters(), betas=(0.9, beta2), weight_decay=0.0),
        torch.Generator().manual_seed(9 if phase == 1 else 19),
        ema=[],
    )
    state.restore(state_path, settings)
    while state.iteration < iterations:
        progress = state.iteration / iterations
        rate = learning_rate * min(1, (state.iteration + 1) / warmup)
        set_learning_rate(state.optimizer, rate * cosine_tail(progress, start=tail))
        clips = draw_vae_batch(phase, state.iteration, progress, state.generator)
        loss = vae_loss(vae, clips, state.generator)
        take_step(state, loss, clip_norm=0.5)
        if state.iteration % save_every == 0 or state.iteration == iterations:
            state.save(state_path, settings)
        report(state.iteration, iterations, loss.item())


def take_step(state: TrainingState, loss: Tensor, *, clip_norm: float) -> None:
    """Make one optimizer step, and move the average where one is kept."""
    loss.backward()
    nn.utils.clip_grad_norm_(state.modules.parameters(), clip_norm)
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.iteration += 1
    if state.ema:
        state.update_ema()


def encode_training_clips(work_dir: Path, *, clips: int) -> None:
    """Write the latents of the training clips, shard by shard, skipping shards that are there.

    A shard holds ``moments``: [clips, 2·channels, frames, height, width], float16, mean then
    standard deviation. If the autoencoder's config has no latent statistics yet, they are measured
    over all shards and written into it.
    """
    vae = AutoencoderKLWan.from_pretrained(work_dir / "vae").eval()
    folder = work_dir / "latents"
    folder.mkdir(exist_ok=True)
    specs = training_specs(clips)
    for first in range(0, clips, SHARD_CLIPS):
        path = folder / f"{first:06d}.safetensors"
        if path.exists():
            continue
        batches = [specs[i : i + 8] for i in range(first, min(first + SHARD_CLIPS, clips), 8)]
        partial = path.with_name(path.name + ".partial")
        save_file({"moments": torch.cat([_moments(vae, batch) for batch in batches])}, partial)
        partial.replace(path)
        print(f"encoded {min(first + SHARD_CLIPS, clips)}/{clips} clips", file=sys.stderr)
    if vae.config.latents_std == [1.0] * LATENT_CHANNELS:
        mean = load_moments(work_dir, clips=clips)[:, :LATENT_CHANNELS].float()
        vae.register_to_config(
            latents_mean=mean.mean((0, 2, 3, 4)).tolist(),
            latents_std=mean.var((0, 2, 3, 4)).sqrt().tolist(),
        )
        save_folder(work_dir / "vae", vae.save_pretrained)


@torch.no_grad()
def _moments(vae: AutoencoderKLWan, specs: Sequence[ClipSpec]) -> Tensor:
    posterior = vae.encode(torch.stack([render(spec) for spec in specs])).latent_dist
    return torch.cat([posterior.mean, posterior.std], dim=1).half()


def load_moments(work_dir: Path, *, clips: int) -> Tensor:
    """Read the shards of ``encode_training_clips`` into one tensor."""
    paths = [work_dir / "latents" / f"{i:06d}.safetensors" for i in range(0, clips, SHARD_CLIPS)]
    return torch.cat([load_file(path)["moments"] for path in paths])[:clips]


class TrainingSet:
    """Latents and tokens of the training clips, drawn from at random."""

    def __init__(self, work_dir: Path, *, clips: int) -> None:
        config = AutoencoderKLWan.load_config(work_dir / "vae")
        self._moments = load_moments(work_dir, clips=clips)
        self._mean = torch.tensor(config["latents_mean"]).view(1, -1, 1, 1, 1)
        self._std = torch.tensor(config["latents_std"]).view(1, -1, 1, 1, 1)
        captions = [str(spec.caption) for spec in training_specs(clips)]
        self._tokens, self._token_mask = tokenize(captions)
        self._empty_tokens, self._empty_mask = tokenize([""])

    def draw(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Draw normalised latents, token ids and their mask; a tenth of captions are empty."""
        index = torch.randint(len(self._moments), (batch,), generator=generator)
        mean, std = self._moments[index].float().chunk(2, dim=1)
        latents = mean + std * torch.randn(mean.shape, generator=generator)
        tokens, token_mask = self._tokens[index].clone(), self._token_mask[index].clone()
        emptied = torch.rand(batch, generator=generator) < EMPTY_CAPTION_SHARE
        tokens[emptied], token_mask[emptied] = self._empty_tokens, self._empty_mask
        return (latents - self._mean) / self._std, tokens, token_mask


def tokenize(prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Tokenize prompts: ids and mask, each [prompts, TEXT_TOKENS], int64."""
    encoded = make_tokenizer()(
        prompts,
        padding="max_length",
        max_length=TEXT_TOKENS,
        truncation=True,
        return_tensors="pt",
    )
    return encoded.input_ids, encoded.attention_mask


def flow_matching_loss(
    modules: nn.ModuleDict,
    batch: tuple[Tensor, Tensor, Tensor],
    *,
    text_tokens: int,
    autocast: bool,
    generator: torch.Generator,
) -> Tensor:
    """Predict noise minus latents from their mix, at logit-normal noise levels shifted by 3.

    Args:
        modules: ``transformer`` and ``text_encoder``.
        batch: As ``TrainingSet.draw`` returns it.
        text_tokens: Text states are zero-padded to this length, as the pipeline does.
        autocast: Compute matrix products in bfloat16.
        generator: Source of noise and noise levels.
    """
    latents, tokens, token_mask = batch
    uniform = torch.sigmoid(torch.randn(len(latents), generator=generator))
    sigma = 3 * uniform / (1 + 2 * uniform)
    noise = torch.randn(latents.shape, generator=generator)
    mixed = torch.lerp(latents, noise, sigma.view(-1, 1, 1, 1, 1))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        text = modules["text_encoder"](tokens, token_mask).last_hidden_state
        text = F.pad(text * token_mask[..., None], (0, 0, 0, text_tokens - text.shape[1]))
        predicted = modules["transformer"](mixed, sigma * 1000, text, return_dict=False)[0]
    return F.mse_loss(predicted.float(), noise - latents)


def make_denoiser(work_dir: Path) -> nn.ModuleDict:
    """Build transformer and text encoder, with adopted weights where ``adopt`` left some."""
    start = work_dir / "start"
    if start.exists():
        transformer = WanTransformer3DModel.from_pretrained(start / "transformer")
        text_encoder = UMT5EncoderModel.from_pretrained(start / "text_encoder", dtype="float32")
    else:
        torch.manual_seed(0)
        transformer, text_encoder = make_transformer(), make_text_encoder()
    return nn.ModuleDict(
        {"transformer": transformer.float().train(), "text_encoder": text_encoder.float().train()}
    )


def train_denoiser(
    work_dir: Path,
    *,
    iterations: int,
    batch: int,
    save_every: int,
    learning_rate: float,
    long_text_share: float,
    clips: int = TRAINING_CLIPS,
    autocast: bool = True,
    report: Report = report_progress,
) -> TrainingState:
    """Train transformer and text encoder, from the last save where there is one."""
    settings = {
        "iterations": iterations,
        "batch": batch,
        "learning_rate": learning_rate,
        "long_text_share": long_text_share,
        "clips": clips,
        "autocast": autocast,
    }
    modules = make_denoiser(work_dir)
    state = TrainingState(
        modules,
        torch.optim.AdamW(modules.parameters(), betas=(0.9, 0.99), weight_decay=0.01),
        torch.Generator().manual_seed(11),
        ema=[parameter.detach().clone() for parameter in modules.parameters()],
    )
    state.restore(work_dir / "transformer.pt", settings)
    training_set = TrainingSet(work_dir, clips=clips)
    while state.iteration < iterations:
        rate = learning_rate * min(1, (state.iteration + 1) / 100)
        progress = state.iteration / iterations
        set_learning_rate(state.optimizer, rate * linear_tail(progress, start=0.6))
        is_long = torch.rand((), generator=state.generator).item() < long_text_share
        loss = flow_matching_loss(
            modules,
            training_set.draw(batch, state.generator),
            text_tokens=LONG_TEXT_TOKENS if is_long else TEXT_TOKENS,
            autocast=autocast,
            generator=state.generator,
        )
        take_step(state, loss, clip_norm=1.0)
        if state.iteration % save_every == 0 or state.iteration == iterations:
            state.save(work_dir / "transformer.pt", settings)
        report(state.iteration, iterations, loss.item())
    return state


@app.command()
def vae(
    work_dir: WorkDir = Path("runs/shapes_wan"),
    iterations: Annotated[int, typer.Option(min=1, help="Phase 1, short clips.")] = 2500,
    long_iterations: Annotated[int, typer.Option(min=1, help="Phase 2, whole clips.")] = 1200,
    learning_rate: float = 1e-3,
    save_every: SaveEvery = 100,
    threads: Threads = 2,
) -> None:
    """Train the autoencoder in two phases.

    Example: python models/shapes_wan/train.py vae --work-dir runs/shapes_wan
    """
    prepare_cpu(threads)
    work_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(5)
    model = make_vae()
    for phase, count in ((1, iterations), (2, long_iterations)):
        train_vae_phase(
            model,
            work_dir / f"vae_phase{phase}.pt",
            phase=phase,
            iterations=count,
            save_every=save_every,
            learning_rate=learning_rate,
        )
    save_folder(work_dir / "vae", model.save_pretrained)


@app.command()
def adopt(
    model: Annotated[Path, typer.Argument(help="A finished model, such as models/shapes_wan.")],
    work_dir: WorkDir = Path("runs/shapes_wan"),
) -> None:
    """Start from a finished model: keep its autoencoder, train its transformer on.

    Example: python models/shapes_wan/train.py adopt models/shapes_wan --work-dir runs/more
    """
    save_folder(work_dir / "vae", lambda out: _copy_tree(model / "vae", out))

    def copy_denoiser(out: Path) -> None:
        for name in ("transformer", "text_encoder"):
            _copy_tree(model / name, out / name)

    save_folder(work_dir / "start", copy_denoiser)


def _copy_tree(source: Path, target: Path) -> None:
    shutil.copytree(source, target, dirs_exist_ok=True)


@app.command()
def latents(
    work_dir: WorkDir = Path("runs/shapes_wan"),
    clips: Annotated[int, typer.Option(min=1, help="Training clips.")] = TRAINING_CLIPS,
    threads: Threads = 2,
) -> None:
    """Encode the training clips once, so that the transformer's training need not.

    Example: python models/shapes_wan/train.py latents --work-dir runs/shapes_wan
    """
    prepare_cpu(threads)
    encode_training_clips(work_dir, clips=clips)


@app.command()
def transformer(
    work_dir: WorkDir = Path("runs/shapes_wan"),
    iterations: Annotated[int, typer.Option(min=1)] = 2120,
    batch: Annotated[int, typer.Option(min=1)] = 16,
    learning_rate: float = 1e-3,
    long_text_share: Annotated[
        float, typer.Option(min=0, max=1, help="Share of batches with text padded to 512 tokens.")
    ] = 0.0,
    clips: Annotated[int, typer.Option(min=1, help="Training clips.")] = TRAINING_CLIPS,
    autocast: Annotated[bool, typer.Option(help="Matrix products in bfloat16.")] = True,
    save_every: SaveEvery = 100,
    threads: Threads = 2,
) -> None:
    """Train the transformer and the text encoder on the latents.

    Example: python models/shapes_wan/train.py transformer --work-dir runs/shapes_wan
    """
    prepare_cpu(threads)
    train_denoiser(
        work_dir,
        iterations=iterations,
        batch=batch,
        save_every=save_every,
        learning_rate=learning_rate,
        long_text_share=long_text_share,
        clips=clips,
        autocast=autocast,
    )


@app.command()
def export(
    work_dir: WorkDir = Path("runs/shapes_wan"),
    out: Annotated[
        Path | None, typer.Option(help="Folder to write; default WORK_DIR/export.")
    ] = None,
) -> None:
    """Write the averaged weights as a diffusers folder in float16 safetensors.

    Example: python models/shapes_wan/train.py export --work-dir runs/shapes_wan
    """
    modules = make_denoiser(work_dir)
    content = torch.load(work_dir / "transformer.pt", weights_only=True)
    with torch.no_grad():
        for parameter, average in zip(modules.parameters(), content["ema"], strict=True):
            parameter.copy_(average)
    pipeline = WanPipeline(
        tokenizer=make_tokenizer(),
        text_encoder=modules["text_encoder"],
        vae=AutoencoderKLWan.from_pretrained(work_dir / "vae"),
        transformer=modules["transformer"],
        scheduler=make_scheduler(),
    )
    target = out or work_dir / "export"
    save_folder(target, pipeline.to(torch.float16).save_pretrained)
    print(target)


if __name__ == "__main__":
    app()
