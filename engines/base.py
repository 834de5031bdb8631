# SPDX-License-Identifier: Apache-2.0
"""The small protocol every backend speaks: compile a graph, load it, bind tensors, run.

Bindings are addresses. A `BoundCall` keeps the tensors it was bound to alive, reads inputs and
writes outputs in place, and may be run any number of times; nothing is copied or allocated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..core.tensor_spec import TensorSpec

__all__ = [
    "ALIGNMENT",
    "Availability",
    "Backend",
    "BoundCall",
    "CapturingBackend",
    "Engine",
    "ProfiledBackend",
    "StreamedBackend",
    "Target",
    "TensorSpec",
]


ALIGNMENT = 256
"""Bytes that some engines want the address of every bound tensor to be a multiple of."""


@dataclass(frozen=True)
class Availability:
    """Whether a backend can be used here.

    Attributes:
        available: True when graphs can be compiled and run here.
        reason: Version and device when available, else why not.
        install: Command that would make it available; empty when it is.
        builds_elsewhere: True when graphs can be compiled here for a machine that is not this
            one (ahead of time, for a GPU), though not run.
        yields_to: Backend that runs the same graphs faster on this machine; `auto` takes that one
            where it can. Empty for none.
    """

    available: bool
    reason: str
    install: str = ""
    builds_elsewhere: bool = False
    yields_to: str = ""

    @property
    def can_build(self) -> bool:
        """Whether ``compile`` works here, wherever the result may run."""
        return self.available or self.builds_elsewhere


@dataclass(frozen=True)
class Target:
    """What a graph is compiled for.

    Attributes:
        precision: Precision of the graph: ``float32``, ``bfloat16`` or ``float16``; the one a
            backend must not change on its own.
        profiles: Input name → (min, opt, max) shapes; empty where a backend needs none.
        compute_capabilities: CUDA compute capabilities as "8.9"; empty for CPU backends.
        options: Further settings of one backend by name, recorded in the manifest.
    """

    precision: str = "float32"
    profiles: Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = field(
        default_factory=dict
    )
    compute_capabilities: tuple[str, ...] = ()
    options: Mapping[str, str | int | bool] = field(default_factory=dict)


class BoundCall(Protocol):
    """An engine with every binding set."""

    def run(self) -> None:
        """Run once (or enqueue, on a device with streams) over the bound tensors."""


class Engine(Protocol):
    """One compiled graph, loaded."""

    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]

    def bind(self, bindings: Mapping[str, Tensor]) -> BoundCall:
        """Bind every input and output by address.

        Args:
            bindings: Input or output name → contiguous tensor on the backend's device, of the
                declared dtype; shapes agree with each other on named dimensions.

        Raises:
            RequestError: a name is missing or unknown, or a dtype or shape does not fit.
        """


class Backend(Protocol):
    """A runtime that compiles ONNX graphs. Instances are cheap and hold no engine."""

    name: ClassVar[str]
    precisions: ClassVar[tuple[str, ...]]
    device: torch.device

    @classmethod
    def probe(cls) -> Availability:
        """Say whether this backend works here, without importing it when it is absent."""

    def compiler_version(self) -> str:
        """Name the compiler's version and what of this machine its engines depend on.

        Engines of another compiler or another machine are other engines.
        """

    def takes_float8(self, target: Target) -> bool:
        """Tell whether engines for ``target`` take weights in float8_e4m3fn as inputs."""

    def compile(self, graph: Path, target: Target, out: Path) -> None:
        """Compile ``graph`` into the file or folder ``out``, recording what it is for.

        Raises:
            BuildError: the backend refuses the graph; names graph and node where it can.
        """

    def load(self, compiled: Path) -> Engine:
        """Load what `compile` wrote.

        Raises:
            BundleError: the file was compiled for another version or machine.
        """

    def synchronize(self) -> None:
        """Wait until every enqueued run has finished."""


@runtime_checkable
class ProfiledBackend(Protocol):
    """A backend whose engines serve a range of sizes, for named devices, after a long build.

    Attributes:
        cache_folder: Where caches that save time are kept between builds and runs; None keeps
            none. They may be deleted, and are no part of a bundle.
        progress: Called with a phase of one engine's build, its finished steps and their number.
    """

    name: ClassVar[str]
    cache_folder: Path | None
    progress: Callable[[str, int, int], None] | None

    def complete(self, target: Target) -> Target:
        """Return ``target`` with what it leaves open filled in, before any graph is traced.

        Raises:
            BuildError: it names a device or an option that there isn't.
        """

    def save_caches(self) -> None:
        """Write the caches of runs so far into ``cache_folder``."""


@runtime_checkable
class StreamedBackend(Protocol):
    """A backend of a CUDA device, whose engines run on a stream of their own.

    Attributes:
        device: A CUDA device; set before the first engine is compiled or loaded.
    """

    device: torch.device

    def on_stream(self) -> AbstractContextManager[None]:
        """Put all work enqueued inside on that stream; join the caller's once at each end."""


@runtime_checkable
class CapturingBackend(Protocol):
    """A backend of a device that replays a recorded chain of calls.

    Attributes:
        captures: Whether calls will be recorded; set before the first engine is loaded.
    """

    captures: bool

    def capture(self, calls: Sequence[BoundCall]) -> BoundCall:
        """Record ``calls``, which must be idempotent, and return their replay.

        Raises:
            RequestError: one of them can't be recorded.
        """
