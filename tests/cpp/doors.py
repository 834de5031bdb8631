"""One request through every door: Python, freewheel-run, the C ABI; Triton's tests compare with these.

The request says nothing but its prompt: steps, guidance, seed, size, shift and policy are the
bundle's. Python and C++ draw noise that differs in the logarithm's last bit, so that Python starts
from the library's.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from loop import Loop
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from freewheel.bundle.manifest import ConfigEntry, GenerationDefaults
from freewheel.bundle.reader import Bundle
from freewheel.policies.setting import CacheSetting
from freewheel.policies.solved import SolvedConfig
from freewheel.runtime.lora import parse_lora
from freewheel.runtime.model import Model
from freewheel.runtime.pipeline.write_lora import write_lora
from freewheel.runtime.session import Session
from freewheel.runtime.settings import choose_setting

Array = NDArray[np.float32]

STEPS = 50
FRONTIER = SolvedConfig.model_validate(
    {
        "infer_steps": STEPS,
        "schedules": [
            {
                "computed": [STEPS * i // count for i in range(count)],
                "mix": {"cond": [[1.0]] * (STEPS - count), "uncond": [[0.9]] * (STEPS - count)},
                "psnr": [30.0 + count] * 9,
            }
            for count in (5, 7, 20)
        ],
    }
)
SIZE = GenerationDefaults(frames=5, height=32, width=48)
CONFIGS = {
    "off": ConfigEntry(cache=CacheSetting(), generation=SIZE),
    "apart": ConfigEntry(
        cache=CacheSetting(policy="taylorseer", branches={"uncond": {"interval": 2}})
    ),
    "listed": ConfigEntry(
        cache=CacheSetting(policy="taylorseer", parameters={"interval": 2}),
        generation=GenerationDefaults(steps=4, sampler="steps_1000_750_500_250", flow_shift=5.0),
    ),
    "frontier": ConfigEntry(cache=FRONTIER.setting()),
}
"""Of the bundle: the default one names a size and nothing else, the others no size; one lists its steps."""

REQUESTS: dict[str, tuple[str | None, dict[str, str]]] = {
    "nothing said": (None, {}),
    "a policy by name": ("easycache", {}),
    "a policy by name, with its signal": ("teacache", {"threshold": "5"}),
    "overrides": (
        "taylorseer",
        {"first_exact": "3", "last_exact": "2", "exact_steps": "7,9", "order": "2"},
    ),
    "a config whose branches differ": ("apart", {"interval": "4"}),
    "a config with a list of steps": ("listed", {}),
    "another number of computed steps": ("frontier", {"computed_steps": "7"}),
    "a deadline that nothing keeps": ("frontier", {"deadline": "1e-9"}),
    "a bound on quality": ("frontier", {"min_psnr": "36"}),
    "a deadline far off": ("frontier", {"deadline": "1000000s", "computed_steps": "7"}),
}
"""Name → config or policy, and overrides as they are typed."""

LORAS = {
    "style": (
        "condition_embedder.time_embedder.linear_1",
        "blocks.0.attn1.to_q",
        "blocks.2.ffn.net.2",
    ),
    "subject": ("patch_embedding", "blocks.0.attn1.to_q", "blocks.1.attn2.to_k", "proj_out"),
}
"""Name → modules that it changes: of the timestep's, the context's and the blocks' graphs, and one of both."""

DIFFERENCES = {
    "style": ["blocks.1.norm2.weight", "scale_shift_table"],
    "subject": ["scale_shift_table"],
}
"""Name → parameters that it adds to as they stand."""

LORA_REQUESTS: dict[str, tuple[str | None, dict[str, str], str]] = {
    "a LoRA": ("off", {}, "style"),
    "a LoRA of another strength": ("taylorseer", {"interval": "2"}, "style:-0.5"),
    "two LoRAs": ("teacache", {"threshold": "5"}, "subject:0.7,style:0.3"),
}
"""Name → config or policy, overrides, and LoRAs."""


def write_loras(bundle: Bundle, folder: Path) -> Path:
    """Write every LoRA of `LORAS` in kohya's way, then for the bundle; return the latter's folder."""
    pipeline = folder / "pipeline"
    pipeline.mkdir()
    (pipeline / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    generator = torch.Generator().manual_seed(5)
    for name, modules in LORAS.items():
        state = {}
        for module in modules:
            shape = bundle.manifest.tensors[f"{module}.weight"].shape
            down = torch.randn(5, *shape[1:], generator=generator)
            up = torch.randn(shape[0], 5, *[1] * len(shape[2:]), generator=generator)
            state[f"transformer.{module}.lora_A.weight"] = 0.1 * down
            state[f"transformer.{module}.lora_B.weight"] = up
        for parameter in DIFFERENCES[name]:
            shape = bundle.manifest.tensors[parameter].shape
            difference = 0.1 * torch.randn(shape, generator=generator)
            state[f"transformer.{parameter}.difference"] = difference
        save_file(state, pipeline / f"{name}.safetensors")
        source = parse_lora(f"{pipeline / name}.safetensors:0.6")
        write_lora(bundle, source, folder / "loras" / f"{name}.safetensors", pipeline)
    return folder / "loras"


def merged(bundle: Bundle, folder: Path, loras: str) -> dict[str, torch.Tensor]:
    """Merge as docs/how-to/use-loras.md says that C++ does: float32, term by term, rounded at the end."""
    found: dict[str, torch.Tensor] = {}
    for part in loras.split(","):
        name, _, scale = part.partition(":")
        state = load_file(folder / f"{name}.safetensors")
        strength = np.float32(scale or 1).item()
        for key in (k for k in state if k.endswith(".difference")):
            weight = key.removeprefix("transformer.").removesuffix(".difference")
            base = found.get(weight, bundle.tensor(weight).float())
            found[weight] = base + strength * state[key]
        for key in (k for k in state if k.endswith(".lora_A.weight")):
            module = key.removeprefix("transformer.").removesuffix(".lora_A.weight")
            weight = f"{module}.weight"
            base = found.get(weight, bundle.tensor(weight).float())
            down = state[key].flatten(1)
            up = state[key.replace("lora_A", "lora_B")].flatten(1)
            update = torch.zeros_like(base).flatten(1)
            for k in range(down.shape[0]):
                update += up[:, k : k + 1] * down[k]
            found[weight] = base + strength * update.reshape(base.shape)
    return {n: t.to(bundle.tensor(n).dtype) for n, t in found.items()}


class Doors:
    """A bundle, prompts, and what each door makes of a request."""

    def __init__(self, bundle: Bundle, build: Path, folder: Path) -> None:
        """Take the default config's size and a random prompt.

        Args:
            bundle: Of `tests/conftest.py`'s tiny checkpoint, on OpenVINO.
            build: Folder with `freewheel-run` and `tests/c_run`.
            folder: For inputs and outputs.
        """
        self.bundle, self.build, self.folder = bundle, build, folder
        random = np.random.default_rng(1)
        width = int(bundle.manifest.inputs["text_states"].shape[-1])
        self.states = {
            b: random.standard_normal((8, width), dtype=np.float32) for b in ("cond", "uncond")
        }
        for branch, states in self.states.items():
            np.save(folder / f"{branch}.npy", states)
            states.tofile(folder / f"{branch}.f32")
        self.loras = write_loras(bundle, folder)

    def in_c(
        self, cache: str | None, overrides: Mapping[str, str], lora: str = ""
    ) -> tuple[Array, Array]:
        """Return noise and latents of the program around the C ABI."""
        done = self._in_c(cache, overrides, lora)
        assert done.returncode == 0, done.stderr
        noise, out = (np.fromfile(self.folder / f"{n}.f32", np.float32) for n in ("noise", "out"))
        return noise, out

    def refused_in_c(self, cache: str | None, overrides: Mapping[str, str], lora: str = "") -> str:
        """Return what the C ABI says of a request that it must refuse."""
        done = self._in_c(cache, overrides, lora)
        assert done.returncode == 1, done.stdout
        return done.stderr.strip()

    def in_shell(
        self,
        cache: str | None,
        overrides: Mapping[str, str],
        lora: str = "",
        *,
        options: Sequence[str] = (),
    ) -> Array:
        """Return the latents of freewheel-run."""
        done = self._run(
            "freewheel-run", self.bundle.folder, "--embeddings", self.folder / "cond.npy",
            "--negative", self.folder / "uncond.npy", "--out", self.folder / "out.npy",
            "--threads", torch.get_num_threads(), "--quiet", *(("--cache", cache) if cache else ()),
            *(part for n, v in overrides.items() for part in ("--set", f"{n}={v}")),
            *(("--lora-folder", self.loras) if lora else ()),
            *(part for use in lora.split(",") if use for part in ("--lora", use)), *options,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return np.load(self.folder / "out.npy")

    def in_python(
        self, cache: str | None, overrides: Mapping[str, str], noise: Array, lora: str = ""
    ) -> tuple[Array, dict[str, Any]]:
        """Return the latents of Python's session, and what each branch did.

        Weights with LoRAs are those of `merged`: PEFT, which Python has them from, adds in another
        order.
        """
        entry = choose_setting(self.bundle, cache, overrides, lambda text: None)
        run, scale = entry.generation, self.bundle.manifest.latent_scale
        frames, height, width = (
            (run.frames - 1) // scale.frames + 1,
            run.height // scale.pixels,
            run.width // scale.pixels,
        )
        drawn = torch.randn(
            (1, 4, frames, height, width), generator=torch.Generator().manual_seed(run.seed)
        )
        np.testing.assert_allclose(noise.reshape(drawn.shape), drawn.numpy(), atol=1e-4)
        loop = Loop(
            self.bundle,
            noise.reshape(drawn.shape),
            {b: {"text_states": s[None]} for b, s in self.states.items()},
            run.steps,
            run.flow_shift,
            run.sampler or self.bundle.manifest.samplers[0].name,
            (run.guidance_scale,),
        )
        if lora:
            model = Model(self.bundle, "openvino")
            loop.sessions = [Session(model.with_weights(merged(self.bundle, self.loras, lora)))]
        samples, branches = loop.in_python(entry.cache)
        return samples["latents"], branches

    def _in_c(
        self, cache: str | None, overrides: Mapping[str, str], lora: str
    ) -> subprocess.CompletedProcess[str]:
        states = self.states["cond"]
        return self._run(
            "tests/c_run",
            self.bundle.folder,
            torch.get_num_threads(),
            self.folder / "cond.f32",
            self.folder / "uncond.f32",
            *states.shape,
            self.folder / "noise.f32",
            self.folder / "out.f32",
            cache or "",
            *(f"{n}={v}" for n, v in overrides.items()),
            *((f"lora_folder={self.loras}", f"lora={lora}") if lora else ()),
        )

    def _run(self, program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        command = [str(self.build / program), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False)
