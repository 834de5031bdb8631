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

from freewheel.bundle.reader import Bundle
from freewheel.bundle.sampler_table import SamplerTable
from freewheel.policies.setting import CacheSetting
from freewheel.runtime.model import LoadedModel
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


@dataclass
class Loop:
    """A request that both languages can run.

    Attributes:
        bundle: What to run, on OpenVINO.
        latents: Start noise.
        prompts: Branch → per-prompt inputs; `uncond` runs where the guidance is above 1.
        steps, shift, sampler: Which of the bundle's tables.
        guidance: Scale, and of the second expert where there is one.
    """

    bundle: Bundle
    latents: Array
    prompts: Mapping[str, Mapping[str, Array]]
    steps: int
    shift: float
    sampler: str = "euler"
    guidance: tuple[float, ...] = (1.0,)
    sessions: list[Session] = field(default_factory=list)

    def table(self) -> SamplerTable:
        entry = next(
            s
            for s in self.bundle.manifest.samplers
            if s.name == self.sampler and s.flow_shift == self.shift
        )
        return SamplerTable.of(load_file(self.bundle.path(entry.file))[str(self.steps)])

    def in_python(self, setting: CacheSetting) -> tuple[Array, dict[str, Any]]:
        """Return the last sample and per branch what the statistics say, over all experts."""
        if not self.sessions:
            experts = range(max(1, len(self.bundle.manifest.experts)))
            self.sessions = [
                Session(LoadedModel(self.bundle, "openvino", expert=e)) for e in experts
            ]
        table = self.table()
        timesteps = torch.from_numpy(table.timesteps.astype(np.float32))
        samples, outputs = [torch.from_numpy(self.latents)], []
        branches: dict[str, dict[str, list[Any]]] = {}
        for index, session in enumerate(self.sessions):
            mine = session.model.serves(timesteps)
            if not bool(mine.any()):
                continue
            sigmas = torch.from_numpy(table.sigmas.astype(np.float32))
            session.begin(timesteps[mine], setting, sigmas=sigmas[mine])
            first, scale = (
                int(mine.long().argmax()),
                self.guidance[min(index, len(self.guidance) - 1)],
            )
            for branch, states in self.prompts.items():
                given = {n: torch.from_numpy(t) for n, t in states.items()}
                session.set_prompt(branch, given)
            for step in range(int(mine.sum())):
                given = {"latents": samples[-1]}
                found = {b: session.step(b, step, given).clone() for b in self.prompts}
                output = found["cond"]
                if "uncond" in found:
                    output = found["uncond"] + scale * (found["cond"] - found["uncond"])
                outputs.append(output)
                samples.append(table.advance(first + step, samples, outputs))
            for branch, own in session.statistics.as_dict()["branches"].items():
                known = branches.setdefault(branch, {n: [] for n in COMPARED})
                for name in COMPARED:
                    known[name] += own[name]
        return samples[-1].numpy(), branches

    def in_cpp(
        self, build: Path, setting: CacheSetting, folder: Path, config: str | None = None,
        *, tool: str = "freewheel-run", options: Iterable[str] = ("--backend", "openvino"),
    ) -> tuple[Array, dict[str, Any]]:  # fmt: skip
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
        np.save(folder / "latents.npy", self.latents)
        overrides = {} if config else overrides_of(setting)
        out = folder / "out.safetensors"
        command = [
            build / tool, self.bundle.folder, "--out", out, "--cache", config or setting.policy,
            "--embeddings", folder / "prompts.safetensors", "--latents", folder / "latents.npy",
            "--steps", self.steps, "--guidance", self.guidance[0], "--shift", self.shift,
            "--sampler", self.sampler, "--threads", torch.get_num_threads(),
            *options, "--json", "--quiet",
            *(p for scale in self.guidance[1:] for p in ("--guidance-2", scale)),
            *(p for n, v in overrides.items() for p in ("--set", f"{n}={json.dumps(v)}")),
        ]  # fmt: skip
        done = subprocess.run(
            [str(c) for c in command], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return load_file(out)["latents"], json.loads(done.stdout)


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
    """Hold C++ to Python: equal decisions, distances, mixes and latents; return C++'s report."""
    expected, branches = loop.in_python(setting)
    found, report = loop.in_cpp(build, setting, folder, config)
    assert report["branches"].keys() == branches.keys()
    for branch, python in branches.items():
        for what in COMPARED:
            assert report["branches"][branch][what] == python[what], (branch, what)
    assert np.array_equal(found, expected)
    return report
