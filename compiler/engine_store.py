# SPDX-License-Identifier: Apache-2.0
"""Keep engines of graphs without weights, so that every checkpoint of an architecture shares them.

Building the same graph twice does not give the same bytes (TensorRT-RTX 1.7 numbers its dynamic
dimensions in no fixed order). So the second bundle takes the first one's engine, by hard link where
the file system can.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path

import onnx

from ..bundle.files import link_or_none
from ..configs.errors import BundleError
from ..engines.base import ProfiledBackend, Target
from ..engines.record import EngineRecord, engine_folder
from .build_key import source_digest

__all__ = ["EngineStore"]


class EngineStore:
    """Engines of one backend below a cache folder, by what they depend on."""

    def __init__(self, backend: ProfiledBackend, cache: Path) -> None:
        self._backend, self._folder = backend, cache / "engines"

    def take(self, graph: Path, target: Target, out: Path) -> bool:
        """Give ``out`` the engine of a graph, if a whole one is kept; tell whether it was."""
        kept = self._place(graph, target)
        if kept is None or not kept.is_dir():
            return False
        try:
            EngineRecord.read(kept)
        except BundleError:
            return False
        _copy(kept, out)
        return True

    def keep(self, graph: Path, target: Target, out: Path) -> None:
        """Keep the engine ``out`` of a graph, unless it holds weights.

        Raises:
            OutputError: the store can't be written.
        """
        place = self._place(graph, target)
        if place is not None:
            _copy(out, place)

    def _place(self, graph: Path, target: Target) -> Path | None:
        """Name an engine after its graph's bytes, its target and what compiles it."""
        model = onnx.load(graph, load_external_data=False)
        if any(t.data_location == onnx.TensorProto.EXTERNAL for t in model.graph.initializer):
            return None
        about = [
            self._backend.name, self._backend.compiler_version(), source_digest(), asdict(target),
        ]  # fmt: skip
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
        digest.update(graph.read_bytes())
        return self._folder / digest.hexdigest()


def _copy(source: Path, target: Path) -> None:
    with engine_folder(target) as folder:
        for file in source.iterdir():
            if link_or_none(file, folder / file.name) is None:
                shutil.copyfile(file, folder / file.name)
