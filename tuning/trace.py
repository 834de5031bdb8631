# SPDX-License-Identifier: Apache-2.0
"""Recorded runs: what a policy would have seen at every step, in one npz file.

Format: ``timesteps`` and ``sigmas`` [S], ``branches``; per branch b ``b/temb`` [S, C],
``b/timestep_proj`` [S, 6C], ``b/modulated_input`` and ``b/first_block_residual`` [S, N, C] where
recorded, ``b/feature`` and ``b/residual`` [S, N, C], ``b/latents`` and ``b/model_output`` (the last
two dimensions as the model has them, the others flattened), ``b/computed`` [S]; scalars ``frames``,
``tokens_per_frame``, ``height`` and ``width`` (of the token grid of one frame, where inputs tell),
``blocks`` and ``first_blocks`` (of the body, and of those how many ``first_block_residual`` is of).
float32, batch element 0. Where tokens were sampled, ``token_index`` names them among all N.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..bundle.sections import Sections
from ..core.errors import RequestError
from ..core.output import replaced_whole
from ..policies.schedule import Schedule
from ..runtime.step_record import StepRecord

__all__ = ["Trace", "TraceRecorder", "load_trace"]

Array = NDArray[np.float32]

SIGNALS = (
    "temb",
    "timestep_proj",
    "modulated_input",
    "first_block_residual",
    "latents",
    "filtered_latents",
    "model_output",
)

RUN_ARRAYS = ("timesteps", "sigmas")
"""[S], of the run and not of a branch."""

UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    EOFError,
    RuntimeError,
    MemoryError,
    zlib.error,
    zipfile.BadZipFile,
)
"""What NumPy and zipfile raise at a file that is damaged (RuntimeError: encrypted, or packed oddly)."""


@dataclass(frozen=True)
class Trace:
    """One recorded run.

    Attributes:
        arrays: Every array of the file by name.
    """

    arrays: Mapping[str, NDArray[Any]]

    @property
    def branches(self) -> list[str]:
        """Branch names."""
        return [str(b) for b in self.arrays["branches"]]

    @property
    def steps(self) -> int:
        """Steps of the run."""
        return len(self.arrays["timesteps"])

    @property
    def schedule(self) -> Schedule:
        """Timesteps and noise levels; those of a flow model where a file holds no ``sigmas``."""
        sigmas = self.arrays.get("sigmas")
        timesteps = self.arrays["timesteps"].tolist()
        return Schedule.of(timesteps, None if sigmas is None else sigmas.tolist())

    def get(self, branch: str, name: str) -> Array:
        """Return ``branch/name``.

        Raises:
            RequestError: it was not recorded.
        """
        key = f"{branch}/{name}"
        if key not in self.arrays:
            raise RequestError(
                f"trace, array '{key}'",
                "was not recorded",
                "record again; hidden-sized signals need --record-signals",
            )
        return self.arrays[key]

    def has(self, branch: str, name: str) -> bool:
        """Tell whether ``branch/name`` was recorded."""
        return f"{branch}/{name}" in self.arrays

    def frame_shape(self) -> tuple[int, int]:
        """Return frames and recorded tokens per frame."""
        frames = int(self.arrays["frames"])
        index = self.arrays.get("token_index")
        tokens = int(self.arrays["tokens_per_frame"])
        if index is None:
            return frames, tokens
        grid = index.reshape(frames, -1) if len(index) % frames == 0 else None
        if grid is None or not (grid - grid[:1] == np.arange(frames)[:, None] * tokens).all():
            raise RequestError(
                "trace, array 'token_index'",
                "samples other tokens in each frame, so that motion between frames can't be told",
                "sample the same positions of every frame",
            )
        return frames, grid.shape[1]

    def save(self, path: Path) -> None:
        """Write the file whole or not at all.

        Raises:
            OutputError: it can't be written.
        """
        with (
            replaced_whole(path, "choose another --record") as partial,
            partial.open("wb") as stream,
        ):
            np.savez(stream, **self.arrays)  # type: ignore[arg-type]  # numpy types it as bool


def load_trace(path: Path | str) -> Trace:
    """Read a trace; never unpickles.

    Raises:
        RequestError: no such file, not a trace, or arrays that don't fit each other.
    """
    where = str(path)
    try:
        if Path(path).stat() and not zipfile.is_zipfile(path):
            raise RequestError(
                where, "is not a trace: it is no .npz file", "record one with `run --record`"
            )
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except UNREADABLE as error:
        # NumPy's advice to unpickle is none that we give.
        holds_objects = "allow_pickle" in str(error)
        reason = "it holds Python objects instead of arrays of numbers" if holds_objects else error
        raise RequestError(
            where, f"is not a trace: {reason}", "record one with `run --record`"
        ) from error
    missing = [n for n in ("timesteps", "branches") if n not in arrays]
    if missing:
        raise RequestError(where, f"lacks '{missing[0]}'", "record it again with `run --record`")
    if arrays["timesteps"].ndim < 1 or arrays["branches"].ndim != 1:
        raise RequestError(
            where, "has 'timesteps' or 'branches' that are no list", "record it again"
        )
    trace = Trace(arrays)
    if "sigmas" in arrays and arrays["sigmas"].shape != arrays["timesteps"].shape:
        raise RequestError(
            f"{where}, array 'sigmas'",
            f"has shape {list(arrays['sigmas'].shape)}, 'timesteps' has {trace.steps} steps",
            "record it again",
        )
    for branch in trace.branches:
        for name in (*SIGNALS, "feature", "residual", "computed"):
            shape = trace.get(branch, name).shape if trace.has(branch, name) else (trace.steps,)
            if shape[:1] != (trace.steps,):
                raise RequestError(
                    f"{where}, array '{branch}/{name}'",
                    f"has shape {list(shape)}, 'timesteps' has {trace.steps} steps",
                    "record it again",
                )
    return trace


@dataclass
class TraceRecorder:
    """Collects a trace while a session runs.

    Attributes:
        wants_signals: Record signals that take a graph too: the modulated input and the first
            block's residual, which take half as much again each, and the filtered latents.
        tokens_per_frame: Tokens to keep of each frame, evenly spread; None keeps all.
    """

    wants_signals: bool = False
    across_experts: ClassVar[bool] = False
    tokens_per_frame: int | None = None
    _tables: dict[str, Array] = field(default_factory=dict)
    _steps: dict[str, dict[str, list[Any]]] = field(default_factory=dict)
    _dims: dict[str, int] = field(default_factory=dict)
    _index: Tensor | None = None
    _sections: Sections | None = None

    def on_run(self, tables: Mapping[str, Tensor], schedule: Schedule) -> None:
        """Start over with a new run's tables."""
        self._steps.clear()
        self._tables = {n: t.float().cpu().numpy().copy() for n, t in tables.items()}
        self._tables["timesteps"] = np.array(schedule.timesteps, np.float32)
        self._tables["sigmas"] = np.array(schedule.sigmas, np.float32)

    def on_step(self, record: StepRecord, dims: Mapping[str, int]) -> None:
        """Keep one step."""
        if dict(dims) != self._dims:
            self._dims = dict(dims)
            self._index = self._sample()
        self._sections = record.sections
        arrays = self._steps.setdefault(record.branch, {})
        arrays.setdefault("computed", []).append(record.computed)
        shape = record.residual.shape
        odd = {n for n, signal in record.signals.items() if signal.shape != shape}
        missing = torch.full_like(record.residual[:1], float("nan"))
        feature = record.feature if record.feature is not None else missing
        hidden_sized = {
            "residual": record.residual,
            "feature": feature,
            **{n: signal for n, signal in record.signals.items() if n not in odd},
        }
        for name, tensor in hidden_sized.items():
            first = tensor[0] if self._index is None else tensor[0].index_select(0, self._index)
            arrays.setdefault(name, []).append(first.float().cpu().numpy().copy())
        small = {
            "latents": record.buffers["latents"],
            "model_output": record.model_output,
            **{n: record.signals[n] for n in odd},
        }
        for name, tensor in small.items():
            flat = tensor[0].reshape(-1, *tensor.shape[-2:])
            arrays.setdefault(name, []).append(flat.float().cpu().numpy().copy())

    def _sample(self) -> Tensor | None:
        per_frame, frames = self._dims["tokens_per_frame"], self._frames()
        if self.tokens_per_frame is None or self.tokens_per_frame >= per_frame:
            return None
        positions = torch.linspace(0, per_frame - 1, self.tokens_per_frame).round().long()
        return (torch.arange(frames)[:, None] * per_frame + positions).flatten()

    def _frames(self) -> int:
        return self._dims["tokens"] // self._dims["tokens_per_frame"]

    def trace(self) -> Trace:
        """Return what was recorded.

        Raises:
            RequestError: a branch left steps out, so a replay would miss what they were.
        """
        steps = len(self._tables["timesteps"])
        for branch, recorded in self._steps.items():
            if (count := len(recorded["computed"])) != steps:
                raise RequestError(
                    f"trace, branch '{branch}'",
                    f"was recorded for {count} of {steps} steps",
                    "record a whole run, without a guidance interval",
                )
        dims = self._dims
        grid = {n: dims[n] for n in ("height", "width") if n in dims}
        ratio = (prod(grid.values()) // dims["tokens_per_frame"]) ** 0.5
        arrays: dict[str, NDArray[Any]] = {
            **{name: self._tables[name] for name in RUN_ARRAYS},
            "branches": np.array(list(self._steps)),
            "frames": np.array(self._frames()),
            "tokens_per_frame": np.array(dims["tokens_per_frame"]),
            **{n: np.array(round(size / ratio)) for n, size in grid.items()},
        }
        if self._sections is not None:
            arrays["blocks"] = np.array(self._sections.blocks)
            arrays["first_blocks"] = np.array(self._sections.first_blocks)
        if self._index is not None:
            arrays["token_index"] = self._index.numpy()
        for branch, recorded in self._steps.items():
            for name, table in self._tables.items():
                if name in SIGNALS:
                    arrays[f"{branch}/{name}"] = table
            for name, values in recorded.items():
                arrays[f"{branch}/{name}"] = (
                    np.stack(values) if name != "computed" else np.array(values)
                )
        return Trace(arrays)
