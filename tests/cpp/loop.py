"""One denoise loop over a bundle's sampler table, in Python and by freewheel-run, to be compared."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from torch import Tensor

from freewheel.bundle.reader import Bundle
from freewheel.bundle.sampler_table import SamplerTable
from freewheel.policies.setting import CacheSetting, GuardSetting
from freewheel.runtime.model import Model
from freewheel.runtime.session import Session

Array = NDArray[Any]


def crossed(every: Iterable[str], covering: Collection[str]) -> list[Any]:
    """Return parameters of which those outside a covering set run nightly.

    No runtime holds code of a policy or a model, so a full cross proves little more.
    """
    return [
        pytest.param(name, marks=() if name in covering else pytest.mark.nightly) for name in every
    ]


COMPARED = ("computed", "distance", "mix")

BY_CONTENT = CacheSetting(
    policy="teacache",
    signal="modulated_input",
    guard=GuardSetting(first_exact=1, last_exact=1),
    parameters={"threshold": 1.0, "coefficients": [0.6]},
)
"""Every step that may be reused adds 0.6 of the threshold, from a signal of every step."""


@dataclass
class Loop:
    """A request that both languages can run.

    Attributes:
        bundle: What to run, on OpenVINO.
        latents: Start noise.
        prompts: Branch → per-prompt inputs; `uncond` runs where the guidance is above 1.
        steps, shift, sampler: Which of the bundle's tables.
        guidance: Scale, and of the second expert where there is one.
        beside: Latents beside the first → their start noise.
        guidance_of: Latents beside the first → their scale, where that is another.
    """

    bundle: Bundle
    latents: Array
    prompts: Mapping[str, Mapping[str, Array]]
    steps: int
    shift: float
    sampler: str = "euler"
    guidance: tuple[float, ...] = (1.0,)
    sessions: list[Session] = field(default_factory=list)
    beside: Mapping[str, Array] = field(default_factory=dict)
    guidance_of: Mapping[str, float] = field(default_factory=dict)

    def table(self, latents: str = "latents") -> SamplerTable:
        named = [s for s in self.bundle.manifest.samplers if s.name == self.sampler]
        entry = next(
            s
            for s in (*(s for s in named if s.latents == latents != "latents"), *named)
            if s.latents != "latents" or s.flow_shift == self.shift
        )
        return SamplerTable.of(load_file(self.bundle.path(entry.file))[str(self.steps)])

    def in_python(self, setting: CacheSetting) -> tuple[dict[str, Array], dict[str, Any]]:
        """Return the last samples and per branch what the statistics say, over all experts."""
        if not self.sessions:
            experts = range(max(1, len(self.bundle.manifest.experts)))
            self.sessions = [Session(Model(self.bundle, "openvino", expert=e)) for e in experts]
        table = self.table()
        tables = {n: self.table(n) for n in self.beside}
        timesteps = torch.from_numpy(table.timesteps.astype(np.float32))
        beside = {n: torch.from_numpy(t.timesteps.astype(np.float32)) for n, t in tables.items()}
        tables["latents"] = table
        noise = {"latents": self.latents, **self.beside}
        samples = {n: [torch.from_numpy(start)] for n, start in noise.items()}
        outputs: dict[str, list[Tensor]] = {n: [] for n in noise}
        branches: dict[str, dict[str, list[Any]]] = {}
        for index, session in enumerate(self.sessions):
            mine = session.model.serves(timesteps)
            if not bool(mine.any()):
                continue
            sigmas = torch.from_numpy(table.sigmas.astype(np.float32))
            shares = {n: values[mine] for n, values in beside.items()}
            session.begin(timesteps[mine], setting, sigmas=sigmas[mine], beside=shares)
            first, scale = (
                int(mine.long().argmax()),
                self.guidance[min(index, len(self.guidance) - 1)],
            )
            for branch, states in self.prompts.items():
                given = {n: torch.from_numpy(t) for n, t in states.items()}
                session.set_prompt(branch, given)
            for step in range(int(mine.sum())):
                given = {n: known[-1] for n, known in samples.items()}
                found = {}
                for branch in self.prompts:
                    session.step(branch, step, given)
                    found[branch] = {n: t.clone() for n, t in session.outputs(branch).items()}
                for name, output in found["cond"].items():
                    if "uncond" in found:
                        other = found["uncond"][name]
                        output = other + self.guidance_of.get(name, scale) * (output - other)
                    outputs[name].append(output)
                    table = tables[name]
                    after = table.advance(first + step, samples[name], outputs[name])
                    samples[name].append(after)
            for branch, own in session.statistics.as_dict()["branches"].items():
                known = branches.setdefault(branch, {n: [] for n in COMPARED})
                for name in COMPARED:
                    known[name] += own[name]
        return {n: known[-1].numpy() for n, known in samples.items()}, branches

    def in_cpp(
        self,
        build: Path,
        setting: CacheSetting,
        folder: Path,
        config: str | None = None,
        *,
        tool: str = "freewheel-run",
        options: Iterable[str] = ("--backend", "openvino"),
    ) -> tuple[dict[str, Array], dict[str, Any]]:
        """Run freewheel-run; return its latents and what it prints with --json.

        Args:
            build: Its folder.
            setting: What to override of the policy's defaults.
            folder: For its inputs and output.
            config: The bundle's config that `setting` is, in place of overrides.
            tool: The program, in the build's folder.
            options: Which engines, and how they are driven.
        """
        named = {f"{b}.{n}": t for b, states in self.prompts.items() for n, t in states.items()}
        save_file(named, folder / "prompts.safetensors")
        save_file({"latents": self.latents, **self.beside}, folder / "latents.safetensors")
        overrides = {} if config else overrides_of(setting)
        out = folder / "out.safetensors"
        command = [
            build / tool, self.bundle.folder, "--out", out, "--cache", config or setting.policy,
            "--embeddings", folder / "prompts.safetensors", "--latents", folder / "latents.safetensors",
            "--steps", self.steps, "--guidance", self.guidance[0], "--shift", self.shift,
            "--sampler", self.sampler, "--threads", torch.get_num_threads(),
            *options, "--json", "--quiet",
            *(p for scale in self.guidance[1:] for p in ("--guidance-2", scale)),
            *(p for n, scale in self.guidance_of.items() for p in ("--guidance-of", f"{n}={scale}")),
            *(p for n, v in overrides.items() for p in ("--set", f"{n}={json.dumps(v)}")),
        ]  # fmt: skip
        done = subprocess.run(
            [str(c) for c in command], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return load_file(out), json.loads(done.stdout)


def are_equal(found: Mapping[str, Array], expected: Mapping[str, Array]) -> bool:
    """Tell whether two runs sampled the same, bit for bit."""
    alike = (np.array_equal(found[name], wanted) for name, wanted in expected.items())
    return found.keys() == expected.keys() and all(alike)


def overrides_of(setting: CacheSetting) -> dict[str, Any]:
    """Return what ``--set`` takes to make a policy's defaults this setting."""
    overrides: dict[str, Any] = {**setting.parameters}
    overrides |= {n: v for n, v in setting.guard.model_dump().items() if v != []}
    if setting.signal is not None:
        overrides["signal"] = setting.signal
    return overrides


def check_equal(
    loop: Loop, build: Path, setting: CacheSetting, folder: Path, config: str | None = None
) -> dict[str, Any]:
    """Hold C++ to Python: equal decisions, distances, mixes and samples; return C++'s report."""
    expected, branches = loop.in_python(setting)
    found, report = loop.in_cpp(build, setting, folder, config)
    assert report["branches"].keys() == branches.keys()
    for branch, python in branches.items():
        for what in COMPARED:
            assert report["branches"][branch][what] == python[what], (branch, what)
    assert are_equal(found, expected)
    return report


def check_offload(loop: Loop, build: Path, folder: Path) -> None:
    """Hold a run with its blocks' weights in host memory to one without."""
    expected, _ = loop.in_cpp(build, BY_CONTENT, folder)
    options = ("--backend", "openvino", "--offload")
    found, _ = loop.in_cpp(build, BY_CONTENT, folder, options=options)
    assert are_equal(found, expected)
