# SPDX-License-Identifier: Apache-2.0
"""Engines and weights of one bundle, loaded once and shared by any number of sessions."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import ClassVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ..bundle.dims import derive_dims
from ..bundle.files import cache_beside
from ..bundle.reader import Bundle
from ..core.errors import BackendUnavailable, BundleError, RequestError
from ..engines import BACKENDS, choose_gpu
from ..engines import backend as find_backend
from ..engines.base import (
    Backend,
    BoundCall,
    CapturingBackend,
    Engine,
    ProfiledBackend,
    StreamedBackend,
)
from ..policies.decision_loop import DecisionRecord
from .offload import HostBlock, OffloadedCall, OffloadedWeights
from .resolved_setting import ResolvedSetting

__all__ = ["DeviceOptions", "Model"]

CHECKED_BYTES = 64 << 20
"""Engine files up to here are compared with their digests before a runtime reads them (50 ms)."""

# The one state of this process: a weight that any session holds on a device is uploaded once.
# Nothing stays here that no session holds.
_UPLOADED: WeakValueDictionary[tuple[str, ...], Tensor] = WeakValueDictionary()
_PINNED: WeakValueDictionary[tuple[str, ...], HostBlock] = WeakValueDictionary()


@dataclass(frozen=True)
class DeviceOptions:
    """How engines are driven.

    Attributes:
        offload: Keep the weights of the block loop in pinned host memory, two blocks on the device.
        cuda_graphs: Replay the body of a computed step, and the reuse of another, as one CUDA graph
            each; with `offload` one graph per block, between the copies.
        check_finite: Stop a run at the first step that makes values that are not finite.
        device: Index of the GPU; None takes the process's current one.
    """

    offload: bool = False
    cuda_graphs: bool = False
    check_finite: bool = True
    device: int | None = None


class Model:
    """A bundle with a backend chosen.

    Engines load when first used. Weights stay memory-mapped on CPU backends and are uploaded once
    per process on others. ``prefix`` precedes the names of an expert's tensors.

    Attributes:
        runs_alone: Whether its graphs may be run again at any time: no other process takes part.
    """

    runs_alone: ClassVar[bool] = True

    def __init__(
        self,
        bundle: Bundle,
        backend: str | None = None,
        options: DeviceOptions | None = None,
        expert: int = 0,
    ) -> None:
        """Choose the backend.

        Args:
            bundle: An open bundle.
            backend: Name of a backend the bundle has engines for; None takes its first.
            options: How engines are driven; None takes the defaults.
            expert: Whose weights, where the bundle holds several transformers of one cut.

        Raises:
            BackendUnavailable: the bundle has no engines for it, or it can't run here.
            RequestError: an option does not fit the model or the backend.
        """
        self.options = options or DeviceOptions()
        self.bundle, self.manifest = bundle, bundle.manifest
        built = [e.backend for e in self.manifest.engines]
        name = backend or built[0]
        if name in BACKENDS and name not in built:
            raise BackendUnavailable(
                f"backend '{name}'",
                f"the bundle has engines for {', '.join(built)} only",
                f"build it again with --backend {name}",
            )
        self.backend: Backend = find_backend(name)
        engines = bundle.engines(name)
        assert engines is not None, "the name was checked against the bundle's engine sets"
        self._files = engines.files
        self._engines: dict[str, Engine] = {}
        self.expert = expert
        experts = self.manifest.experts
        self.prefix = experts[expert].prefix if experts else ""
        self._merged: Mapping[str, Tensor] = {}
        self._tensors: dict[str, Tensor] = {}
        self._check_options()
        self._offloaded = self._offload()
        if isinstance(self.backend, ProfiledBackend):
            self.backend.cache_folder = cache_beside(bundle.folder)

    def dims_of(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """Return all sizes that follow from some.

        Raises:
            RequestError: they don't fit the model.
        """
        return derive_dims(self.manifest, sizes)

    def decide_graph(self, resolved: ResolvedSetting) -> str:
        """Return the graph that decides for a setting."""
        return resolved.policy.graph

    def agree(self, branch: str, step_index: int, decision: DecisionRecord) -> None:
        """Hold a decision against those of other processes that share the model; here there are none."""

    def with_weights(self, weights: Mapping[str, Tensor]) -> Model:
        """Return the same model, engines shared, with other tensors in place of some weights.

        Args:
            weights: By tensor name, of the shape and dtype of the bundle's. They are not copied
                where the model runs on the CPU.
        """
        other = copy.copy(self)
        other._merged, other._tensors = (
            (weights, {})
            if self.options.offload
            else ({}, {name: tensor.to(self.device) for name, tensor in weights.items()})
        )
        other._offloaded = other._offload()
        return other

    def _offload(self) -> OffloadedWeights | None:
        if not self.options.offload:
            return None
        return OffloadedWeights(
            self.device,
            self._host_block,
            streamed=isinstance(self.backend, StreamedBackend),
            capture=self.chain if self.options.cuda_graphs else None,
        )

    @property
    def device(self) -> torch.device:
        """Where every buffer lives."""
        return self.backend.device

    def engine(self, graph: str) -> Engine:
        """Return the engine of ``graph``, loading it the first time.

        Raises:
            BundleError: there is none, it is damaged, or it was compiled for something else.
        """
        if graph not in self._engines:
            where = f"{self.bundle.folder}, graph '{graph}'"
            if graph not in self._files:
                raise BundleError(
                    where, f"has no engine for {self.backend.name}", "build the bundle again"
                )
            damaged = self.bundle.damaged(self._files[graph], CHECKED_BYTES)
            if damaged:
                raise BundleError(
                    where,
                    f"the bytes of '{damaged[0]}' are not those that were built",
                    "build the bundle again",
                )
            self._engines[graph] = self.backend.load(self.bundle.path(self._files[graph]))
        return self._engines[graph]

    def tensor(self, name: str) -> Tensor:
        """Return a weight on the backend's device."""
        if name not in self._tensors:
            if name in self._merged:
                self._tensors[name] = self._merged[name].to(self.device)
            else:
                self._tensors[name] = uploaded(self.bundle, name, self.device)
        return self._tensors[name]

    def serves(self, timesteps: Tensor) -> Tensor:
        """Tell at which timesteps of a run this expert denoises, bool [steps]."""
        experts = self.manifest.experts
        if not experts:
            return torch.ones_like(timesteps, dtype=torch.bool)
        mine = timesteps >= experts[self.expert].from_timestep
        return mine & (timesteps < experts[self.expert - 1].from_timestep) if self.expert else mine

    def chain(self, calls: Sequence[BoundCall]) -> BoundCall:
        """Make one call of several: one CUDA graph where that was asked for.

        They must be idempotent: a capture runs them once more. Offloaded blocks stay apart, each
        with a graph of its own: the copies between them are not in any graph.
        """
        if (
            self.options.cuda_graphs
            and isinstance(self.backend, CapturingBackend)
            and not any(isinstance(call, OffloadedCall) for call in calls)
        ):
            return self.backend.capture(calls)
        return _Chain(tuple(calls))

    def on_stream(self) -> AbstractContextManager[None]:
        """Put what is enqueued inside on the engines' stream, where the backend has one."""
        if isinstance(self.backend, StreamedBackend):
            return self.backend.on_stream()
        return nullcontext()

    def save_caches(self) -> None:
        """Keep what the backend compiled while running, for the next process."""
        if isinstance(self.backend, ProfiledBackend):
            self.backend.save_caches()

    def _host_block(self, names: Sequence[str]) -> HostBlock:
        """Return one block's weights in host memory, page-locked where a GPU copies them.

        Sessions of one checkpoint share a block that no LoRA changes.
        """
        pinned = isinstance(self.backend, StreamedBackend)
        key = (self.bundle.manifest.checkpoint.sha256, str(pinned), *names)
        is_shared = not any(name in self._merged for name in names)
        found = _PINNED.get(key) if is_shared else None
        if found is None:
            merged = {n: self._merged[n] for n in names if n in self._merged}
            stored = {n: self.bundle.tensor(n) for n in names if n not in merged}
            found = HostBlock({n: {**stored, **merged}[n] for n in names}, pinned=pinned)
            if is_shared:
                _PINNED[key] = found
        return found

    def _check_options(self) -> None:
        if self.options.offload and self.manifest.weights == "baked":
            raise RequestError(
                "--offload",
                "can't be had: this bundle's weights are inside its engines",
                "build the bundle with --weights inputs",
            )
        if self.options.cuda_graphs and not isinstance(self.backend, CapturingBackend):
            raise RequestError(
                "--cuda-graphs", f"mean nothing to {self.backend.name}", "leave them out"
            )
        if isinstance(self.backend, CapturingBackend):
            self.backend.captures = self.options.cuda_graphs
        if self.options.device is not None:
            choose_gpu(self.backend, self.options.device)

    def bind(self, graph: str, values: Mapping[str, Tensor], block: int = 0) -> BoundCall:
        """Bind ``graph`` to buffers by name, and to its weights.

        Args:
            graph: Graph name.
            values: At least every input and output of the graph; others are ignored.
            block: Which block's weights a template gets.
        """
        entry = self.manifest.graphs[graph]
        missing = [n for n in (*entry.inputs, *entry.outputs) if n not in values]
        if missing:
            raise BundleError(
                f"{self.bundle.folder}, graph '{graph}', '{missing[0]}'",
                "is given by nothing",
                "build the bundle again",
            )
        bindings = {n: values[n] for n in (*entry.inputs, *entry.outputs)}
        weights = {n: self.prefix + pattern for n, pattern in entry.weights.items()}
        is_template = any("{block}" in pattern for pattern in weights.values())
        if self._offloaded is not None and is_template:
            return self._offloaded.bind(self.engine(graph), bindings, weights, block)
        for name, pattern in weights.items():
            bindings[name] = self.tensor(pattern.replace("{block}", str(block)))
        return self.engine(graph).bind(bindings)


@dataclass(frozen=True)
class _Chain:
    """Calls that run one after another."""

    calls: tuple[BoundCall, ...]

    def run(self) -> None:
        for call in self.calls:
            call.run()


def uploaded(bundle: Bundle, name: str, place: torch.device) -> Tensor:
    """Return a weight on a device, the same tensor for all sessions of this process that hold it.

    Args:
        bundle: Where it lies; bundles of one checkpoint share their tensors.
        name: Tensor name.
        place: Where to.
    """
    tensor = bundle.tensor(name)
    if place == torch.device("cpu"):
        return tensor  # memory-mapped: there is nothing to share that the system does not
    key = (bundle.manifest.checkpoint.sha256, name, str(place))
    found = _UPLOADED.get(key)
    if found is None:
        found = tensor.to(place, copy=True)  # done when this returns, for every stream
        _UPLOADED[key] = found
    return found
