# SPDX-License-Identifier: Apache-2.0
"""Check what the model generates against its captions, and its autoencoder against fresh clips."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from architecture import TEXT_TOKENS
from clips import sample
from diffusers import AutoencoderKLWan
from generate import Frames, Pair, generate_clips, held_out_pairs, load_pipeline, tuning_pairs
from pictures import draw_contact_sheet, draw_residual_changes, measure_residual_changes
from reader import Agreement, Reading, compare_reading, is_motion_readable, read_clip
from torch import Tensor

HERE = Path(__file__).parent
GUIDANCE_SCALE = 3.0  # confirmed on training captions before any held-out one, see README.md
TARGETS = {"color": 0.95, "motion": 0.85, "background": 0.95}
TARGET_PSNR = 30.0
PICTURE_STEPS = 50
FRESH_CLIPS_SEED = 4242


@dataclass(frozen=True)
class Result:
    """One generated clip, read and compared with its caption."""

    pair: Pair
    reading: Reading
    agreement: Agreement


def read_clips(pairs: Sequence[Pair], clips: Sequence[Frames]) -> list[Result]:
    """Read each clip and compare it with its caption."""
    results = []
    for pair, clip in zip(pairs, clips, strict=True):
        reading = read_clip(clip)
        results.append(Result(pair, reading, compare_reading(pair.caption, reading)))
    return results


def summarize(results: Sequence[Result]) -> dict[str, float]:
    """Compute the share of clips that agree, per word, and the mean outline overlap.

    ``readable_motion`` leaves out round shapes that spin or stand still, whose motion agrees with
    either caption.
    """
    readable = [r.agreement.motion for r in results if is_motion_readable(r.pair.caption)]
    shares = {
        word: float(np.mean([getattr(result.agreement, word) for result in results]))
        for word in ("color", "motion", "background", "shape")
    }
    return shares | {
        "readable_motion": sum(readable) / max(1, len(readable)),
        "readable_motion_count": len(readable),
        "overlap": float(np.mean([result.reading.overlap for result in results])),
    }


@torch.no_grad()
def measure_vae_psnr(vae: AutoencoderKLWan, *, count: int) -> list[float]:
    """Reconstruct fresh 17-frame clips; PSNR of each, in dB, over RGB in [0, 1]."""
    generator = torch.Generator().manual_seed(FRESH_CLIPS_SEED)
    return [_clip_psnr(vae, sample(generator)[0]) for _ in range(count)]


def _clip_psnr(vae: AutoencoderKLWan, clip: Tensor) -> float:
    decoded = vae.decode(vae.encode(clip[None]).latent_dist.mode()).sample[0].clamp(-1, 1)
    error = ((decoded - clip) / 2).square().mean()
    return float(-10 * torch.log10(error))


def count_by_word(results: Sequence[Result]) -> dict[str, dict[str, str]]:
    """Count, per shape and per motion, the clips that agree, such as ``{"star": "3/9"}``.

    Motions are counted where they can be seen.
    """
    counts = {}
    for field in ("shape", "motion"):
        kept = [r for r in results if field == "shape" or is_motion_readable(r.pair.caption)]
        words = sorted({getattr(result.pair.caption, field) for result in kept})
        counts[f"by_{field}"] = {word: _count(kept, field, word) for word in words}
    return counts


def _count(results: Sequence[Result], field: str, word: str) -> str:
    agrees = [
        getattr(result.agreement, field)
        for result in results
        if getattr(result.pair.caption, field) == word
    ]
    return f"{sum(agrees)}/{len(agrees)}"


def list_unmet_targets(summary: dict[str, float], mean_psnr: float) -> list[str]:
    """Name the targets that the figures miss."""
    unmet = [word for word, target in TARGETS.items() if summary[word] < target]
    return unmet + ([] if mean_psnr >= TARGET_PSNR else ["vae_psnr"])


def print_report(report: dict[str, object], results: Sequence[Result]) -> None:
    """Print the summary to stdout, and each clip that disagrees to stderr."""
    for result in results:
        wrong = [word for word, agrees in asdict(result.agreement).items() if not agrees]
        if wrong:
            reading = result.reading
            found = ", ".join(f"{word} '{getattr(reading, word)}'" for word in wrong)
            print(f"{result.pair.caption} (seed {result.pair.seed}): {found}", file=sys.stderr)
    for name, value in report.items():
        print(f"{name:24} {_spell(value)}")


def _spell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{word} {count}" for word, count in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def draw_card(model: Path, folder: Path, *, guidance_scale: float, steps: int) -> None:
    """Draw the model card's two pictures from eight held-out pairs."""
    folder.mkdir(parents=True, exist_ok=True)
    pipeline = load_pipeline(model)
    pairs = held_out_pairs(8)
    clips = list(generate_clips(pipeline, pairs, steps=steps, guidance_scale=guidance_scale))
    draw_contact_sheet(pairs, clips, folder / "contact_sheet.png")
    curves = measure_residual_changes(
        pipeline, pairs, steps=PICTURE_STEPS, guidance_scale=guidance_scale
    )
    draw_residual_changes(curves, folder / "residual_change.png")
    np.savetxt(
        folder / "residual_change.csv",
        np.stack([np.mean(curves["cond"], axis=0), np.mean(curves["uncond"], axis=0)], axis=1),
        fmt="%.4f",
        delimiter=",",
        header="cond,uncond",
        comments="",
    )


def main(
    model: Annotated[Path, typer.Option(help="Model folder in diffusers layout.")] = HERE,
    count: Annotated[int, typer.Option(min=1, max=77, help="Pairs to generate.")] = 64,
    steps: Annotated[int, typer.Option(min=2, help="UniPC steps.")] = 30,
    guidance: Annotated[float, typer.Option(help="Guidance scale.")] = GUIDANCE_SCALE,
    tuning: Annotated[
        bool, typer.Option("--tuning", help="Use the pairs that guidance is chosen on.")
    ] = False,
    text_tokens: Annotated[int, typer.Option(help="Padded prompt length.")] = TEXT_TOKENS,
    vae_clips: Annotated[int, typer.Option(min=1, help="Fresh clips for the PSNR.")] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    draw: Annotated[
        Path | None, typer.Option(help="Only draw the model card's pictures into this folder.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
) -> None:
    """Generate clips, read them, and print how often they agree with their captions.

    Exits with 1 when a target is missed. Example: python models/shapes_wan/check.py --count 8
    """
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    if draw is not None:
        draw_card(model, draw, guidance_scale=guidance, steps=steps)
        return
    pairs = tuning_pairs(count) if tuning else held_out_pairs(count)
    pipeline = load_pipeline(model)
    clips = generate_clips(
        pipeline, pairs, steps=steps, guidance_scale=guidance, text_tokens=text_tokens
    )
    results = read_clips(pairs, list(clips))
    summary = summarize(results)
    psnr = measure_vae_psnr(pipeline.vae, count=vae_clips)
    report: dict[str, object] = {
        "pairs": "tuning" if tuning else "held_out",
        "count": count,
        "steps": steps,
        "guidance_scale": guidance,
        "text_tokens": text_tokens,
        **summary,
        **count_by_word(results),
        "vae_psnr": float(np.mean(psnr)),
        "vae_psnr_worst": float(np.min(psnr)),
        "unmet_targets": list_unmet_targets(summary, float(np.mean(psnr))),
    }
    if as_json:
        clips_json = [
            {"prompt": str(result.pair.caption), "seed": result.pair.seed}
            | {"reading": asdict(result.reading), "agreement": asdict(result.agreement)}
            for result in results
        ]
        print(json.dumps({"schema_version": 1, **report, "clips": clips_json}, indent=2))
    else:
        print_report(report, results)
    if report["unmet_targets"]:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
