# SPDX-License-Identifier: Apache-2.0
"""What every family's bundle must do: equal diffusers, run every policy, serve the pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from chain import relative
from torch import Tensor

from freewheel.bundle.manifest import Manifest
from freewheel.bundle.reader import Bundle
from freewheel.policies.setting import CacheSetting, GuardSetting
from freewheel.runtime.model import Model
from freewheel.runtime.pipeline.attach import attach
from freewheel.runtime.session import Session

# Sums in another order; sines of timesteps in float32 weigh most: 3e-6 was seen.
TOLERANCE = 1e-5

STEPS = 8


def timesteps_of(manifest: Manifest, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return whose timestep → [1], of one step's inputs."""
    return {
        of: value.reshape(1)
        for name, entry in manifest.inputs.items()
        if entry.runs == "run"
        for of, value in zip(entry.of, inputs[name], strict=True)
    }


def session_output(session: Session, inputs: Mapping[str, Tensor], branch: str = "cond") -> Tensor:
    """Return the model output at the one step of ``inputs``, computed by engines.

    The next step's timestep, where the model is given that too, is the one that a second step would have.
    """
    given = timesteps_of(session.manifest, inputs)
    behind = given.pop("next", torch.zeros(0))
    first = given.pop("latents")
    session.begin(torch.cat([first, behind]), beside=given)
    declared = session.manifest.inputs
    session.set_prompt(branch, {n: inputs[n] for n, i in declared.items() if i.runs == "prompt"})
    return session.step(branch, 0, {n: inputs[n] for n in session.manifest.latents})


def check_policies(bundle: Bundle, inputs: Mapping[str, Tensor], content: str) -> None:
    """Run every policy; hold those that look at ``content`` to one read-back decision per step."""
    session = Session(Model(bundle, "onnxruntime"))
    prompt = {n: inputs[n] for n, i in bundle.manifest.inputs.items() if i.runs == "prompt"}
    timesteps = torch.linspace(990, 10, STEPS)
    for policy, entry in bundle.manifest.policies.items():
        signal = content if content in entry.spec.signals else None
        # A flat polynomial: every step that may be reused adds 0.6 of the threshold.
        flat = {"threshold": 1.0, "coefficients": [0.6]} if signal else {}
        if signal is None and "threshold" in entry.spec.parameters:
            flat = {"threshold": 100.0}  # changes of random weights are large
        if policy == "solved":
            flat = {"steps": STEPS // 2}  # two steps to a row, each row computed once
        guard = GuardSetting(first_exact=1, last_exact=1)
        setting = CacheSetting(policy=policy, signal=signal, parameters=flat, guard=guard)
        session.begin(timesteps, setting)
        session.set_prompt("cond", prompt)
        for step in range(STEPS):
            now = {n: inputs[n] * (1 - step / STEPS) for n in bundle.manifest.latents}
            session.step("cond", step, now)
            for name, output in session.outputs("cond").items():
                assert bool(torch.isfinite(output).all()), (policy, step, name)
        computed = session.statistics.branches["cond"].computed
        assert computed[0], policy
        if signal is not None:
            assert not session.resolved.is_folded
            assert computed == [True, False, True, False, True, False, True, True], policy
        elif policy != "off":
            assert not all(computed), policy


def check_attach(pipe: Any, bundle: Bundle, arguments: Mapping[str, Any], caches: list[Any]) -> Any:
    """Attach the bundle in place of the pipeline's transformer: the same latents, uncached.

    Where the pipeline samples several things at once they are compared in one row.
    """

    def latents(steps: int) -> Tensor:
        seed = torch.Generator().manual_seed(3)
        pipe.set_progress_bar_config(disable=True)
        options = {"num_inference_steps": steps, "output_type": "latent", "generator": seed}
        found = pipe(**arguments, **options, return_dict=False)[: len(bundle.manifest.latents)]
        return torch.cat([torch.as_tensor(one).flatten() for one in found])

    expected = {steps: latents(steps) for steps in (3, 4)}
    transformer = attach(pipe, bundle, "off", backend="onnxruntime")
    for steps, plain in expected.items():
        assert relative(latents(steps), plain) < 10 * TOLERANCE
        assert transformer.statistics.computed_steps == steps
    for cache in caches:
        transformer.use(cache)
        first = latents(6)
        assert bool(torch.isfinite(first).all())
        reused = transformer.statistics.steps - transformer.statistics.computed_steps
        assert reused > 0, cache
        assert torch.equal(latents(6), first), "a run leaves nothing behind"
    return transformer


def save(model: Any, folder: Path) -> Path:
    """Write a transformer as a checkpoint."""
    model.save_pretrained(folder)
    return folder
