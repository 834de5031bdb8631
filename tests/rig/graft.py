# SPDX-License-Identifier: Apache-2.0
"""Bundles with plans of the stand-in, made of the very graphs that ONNX Runtime runs."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from freewheel.bundle.files import sha256_of
from freewheel.bundle.reader import Bundle
from freewheel.engines import Target
from freewheel.engines.bindings import load_graph, specs_of

LARGEST = 4096
"""Of every dynamic dimension in a plan's profile."""


def grafted(bundle: Bundle, backend: Any, out: Path, capability: str = "8.9") -> Bundle:
    """Copy a bundle, and compile its ONNX Runtime graphs with ``backend`` as well.

    Args:
        bundle: Has engines for ``onnxruntime``.
        backend: A TensorRT backend over the stand-in.
        out: A folder that does not exist.
        capability: Of the GPU that the backend sees.
    """
    shutil.copytree(bundle.folder, out, copy_function=os.link)
    path = out / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    engines = bundle.engines("onnxruntime")
    assert engines is not None, "built for onnxruntime"
    files = {}
    for graph, place in engines.files.items():
        source = bundle.path(place) / "graph.onnx"
        inputs, _ = specs_of(load_graph(source).graph, graph)
        profiles = {
            name: tuple(
                tuple(size if isinstance(d, str) else d for d in spec.shape)
                for size in (1, 2, LARGEST)
            )
            for name, spec in inputs.items()
            if any(isinstance(d, str) for d in spec.shape)
        }
        files[graph] = f"engines/{backend.name}/{graph}"
        backend.compile(source, Target("float32", profiles, (capability,)), out / files[graph])
        for made in (out / files[graph]).iterdir():
            name = str(made.relative_to(out))
            manifest["files"][name] = {"bytes": made.stat().st_size, "sha256": sha256_of(made)}
    entry = {"backend": backend.name, "target": backend.name, "files": files}
    manifest["engines"].append(entry)
    path.unlink()  # a hard link of the other bundle's
    path.write_text(json.dumps(manifest), encoding="utf-8")
    return Bundle(out)
