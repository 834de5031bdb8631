# SPDX-License-Identifier: Apache-2.0
"""Engines and weights of one bundle, loaded once and shared by any number of sessions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..bundle.reader import Bundle
from ..configs.errors import BackendUnavailable
from ..engines import BACKENDS
from ..engines import backend as find_backend
from ..engines.base import Backend, BoundCall, Engine
from .lora import Lora, merge_loras

__all__ = ["LoadedModel"]


class LoadedModel:
    """A bundle with a backend chosen.

    Engines load when first used. Weights stay memory-mapped on CPU backends and are uploaded once
    on others; LoRAs are added into private copies of the tensors they change.
    """

    def __init__(
        self, bundle: Bundle, backend: str | None = None, loras: Sequence[Lora] = ()
    ) -> None:
        """Choose the backend and merge LoRAs.

        Args:
            bundle: An open bundle.
            backend: Name of a backend the bundle has engines for; None takes its first.
            loras: Added to the weights in order.

        Raises:
            BackendUnavailable: the bundle has no engines for it, or it can't run here.
            RequestError: a LoRA does not fit the model.
        """
        self.bundle, self.manifest = bundle, bundle.manifest
        built = [e.backend for e in self.manifest.engines]
        name = backend or built[0]
        if name in BACKENDS and name not in built:
            raise BackendUnavailable(
                f"backend '{name}'", f"the bundle has engines for {', '.join(built)} only",
                f"build it again with --backend {name}",
            )  # fmt: skip
        self.backend: Backend = find_backend(name)
        engines = bundle.engines(name)
        assert engines is not None, "the name was checked against the bundle's engine sets"
        self._files = engines.files
        self._engines: dict[str, Engine] = {}
        self._tensors: dict[str, Tensor] = dict(merge_loras(bundle, loras))

    @property
    def device(self) -> torch.device:
        """Where every buffer lives."""
        return self.backend.device

    def engine(self, graph: str) -> Engine:
        """Return the engine of ``graph``, loading it the first time."""
        if graph not in self._engines:
            self._engines[graph] = self.backend.load(self.bundle.path(self._files[graph]))
        return self._engines[graph]

    def tensor(self, name: str) -> Tensor:
        """Return a weight on the backend's device."""
        if name not in self._tensors:
            self._tensors[name] = self.bundle.tensor(name).to(self.device)
        return self._tensors[name]

    def bind(self, graph: str, values: Mapping[str, Tensor], block: int = 0) -> BoundCall:
        """Bind ``graph`` to buffers by name, and to its weights.

        Args:
            graph: Graph name.
            values: At least every input and output of the graph; others are ignored.
            block: Which block's weights a template gets.
        """
        entry = self.manifest.graphs[graph]
        bindings = {n: values[n] for n in (*entry.inputs, *entry.outputs)}
        for name, pattern in entry.weights.items():
            bindings[name] = self.tensor(pattern.replace("{block}", str(block)))
        return self.engine(graph).bind(bindings)
