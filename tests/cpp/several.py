"""Models that sample several things at once, or are given several timesteps, and a request of them.

They are the tiny random ones of the cutter's tests.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from cases import Case
from diffusers import MiniMaxH3Scheduler
from loop import Loop
from test_bundles import named_inputs

from freewheel.bundle.reader import Bundle
from freewheel.compiler.cut.prove import random_inputs
from freewheel.compiler.cut.row import SIZES

STEPS = 6


def save(one: Case, folder: Path) -> None:
    """Write a model; of MiniMax-H3 with its two schedulers, as a pipeline's folder."""
    if one.row.name != "minimax_h3":
        one.model.save_pretrained(folder)
        return
    one.model.save_pretrained(folder / "transformer")
    index: dict[str, object] = {"_class_name": "MiniMaxH3ModularPipeline"}
    index["transformer"] = ["diffusers", type(one.model).__name__]
    for part, shift in (("scheduler", 12.0), ("audio_scheduler", 3.0)):
        MiniMaxH3Scheduler(shift=shift).save_pretrained(folder / part)
        index[part] = ["diffusers", "MiniMaxH3Scheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))


def loop_of(one: Case, bundle: Bundle, counts: Mapping[str, int] = SIZES) -> Loop:
    """Return a loop of both branches, each of the latents with a guidance scale of its own.

    Args:
        one: A model that was saved by `save`.
        bundle: Of it.
        counts: Patches in each dimension.
    """
    config: Any = one.model.config
    raw = random_inputs(one.row, config, one.row.sizes(config, counts))
    inputs = {n: t.numpy() for n, t in named_inputs(bundle, raw).items()}
    declared = bundle.manifest.inputs
    prompt = {n: inputs[n] for n, i in declared.items() if i.runs == "prompt"}
    other = {n: -t if t.dtype == np.float32 and "text" in n else t for n, t in prompt.items()}
    beside = {n: inputs[n] for n in bundle.manifest.latents[1:]}
    own = bundle.manifest.samplers[0]
    return Loop(
        bundle,
        inputs["latents"],
        {"cond": prompt, "uncond": other},
        STEPS,
        own.flow_shift,
        own.name,
        guidance=(3.0,),
        beside=beside,
        guidance_of=dict.fromkeys(beside, 2.0),
    )
