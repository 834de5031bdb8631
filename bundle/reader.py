# SPDX-License-Identifier: Apache-2.0
"""Open a bundle: read its manifest, check what it claims, hand out paths and weights."""

from __future__ import annotations

from bisect import bisect_right
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from ..core.errors import BundleError, CheckpointError, nearest
from ..core.strict_json import parse_json
from .files import safe_path, sha256_of, sha256_of_each
from .manifest import MANIFEST, SCHEMA_VERSION, EngineSetEntry, Manifest, TensorEntry
from .references import reference_faults
from .safetensors_header import read_header

__all__ = ["MANIFEST", "Bundle", "parse_manifest"]

MAX_MANIFEST_BYTES = 256 << 20


def parse_manifest(content: bytes, where: str) -> Manifest:
    """Read a manifest's text, and check everything that it says about itself.

    Args:
        content: JSON.
        where: What to call the file in messages.

    Raises:
        BundleError: no JSON, a newer schema, or faults: all of them in one error.
    """
    hint = "build the bundle again"
    try:
        data = parse_json(content)
    except ValueError as error:
        raise BundleError(where, f"is not JSON: {error}", hint) from error
    version = data.get("schema_version") if isinstance(data, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise BundleError(
            where,
            f"has schema_version {version}; this Freewheel reads up to {SCHEMA_VERSION}",
            "update Freewheel, or build the bundle again with this version",
        )
    if isinstance(version, int) and version < SCHEMA_VERSION:
        raise BundleError(
            where, f"has schema_version {version}; this Freewheel reads {SCHEMA_VERSION}", hint
        )
    try:
        manifest = Manifest.model_validate(data)
    except ValidationError as error:
        found = [
            f"'{'.'.join(map(str, e['loc']))}' {e['msg'].lower()}"
            for e in error.errors(include_input=False, include_url=False)
        ]
        raise BundleError(where, _listed(found), hint) from error
    if found := reference_faults(manifest):
        raise BundleError(where, _listed(found), hint)
    return manifest


def _listed(faults: list[str]) -> str:
    return f"{len(faults)} faults: {'; '.join(faults[:10])}"


class Bundle:
    """A folder that `build` wrote, opened for reading.

    Opening checks the manifest, that no path leaves the folder, and every file's size; `digests`
    also checks the bytes. Weights are memory-mapped: a tensor costs memory when it is touched.
    """

    def __init__(self, folder: Path | str) -> None:
        """Open the bundle in ``folder``.

        Raises:
            BundleError: no bundle, a newer schema, an unusable manifest, or a file whose size is
                not what the manifest says.
        """
        self.folder = Path(folder)
        self.manifest = self._read_manifest()
        self._check_files()
        self._open_files: dict[str, _WeightFile] = {}

    def _read_manifest(self) -> Manifest:
        path = self.folder / MANIFEST
        try:
            if path.stat().st_size > MAX_MANIFEST_BYTES:
                raise BundleError(str(path), "is absurdly large", "build the bundle again")
            content = path.read_bytes()
        except OSError as error:
            raise BundleError(
                str(path), f"can't be read: {error.strerror}", "give the folder that `build` wrote"
            ) from error
        return parse_manifest(content, str(path))

    def _check_files(self) -> None:
        for name, entry in self.manifest.files.items():
            path = safe_path(self.folder, name)
            try:
                size = path.stat().st_size if path.is_file() else None
            except OSError:  # a name that no file can have
                size = None
            if size != entry.bytes:
                found = "is missing" if size is None else f"has {size} bytes"
                raise BundleError(
                    f"{self.folder}, file '{name}'",
                    f"{found}, the manifest says {entry.bytes} bytes",
                    "build the bundle again",
                )
        for name, tensor in self.manifest.tensors.items():
            file = self.manifest.files.get(tensor.file)
            if file is None or tensor.offset + tensor.bytes > file.bytes:
                raise BundleError(
                    f"{self.folder}, tensor '{name}'",
                    f"lies outside file '{tensor.file}'",
                    "build the bundle again",
                )
        for entry_name, graph in self.manifest.graphs.items():
            if graph.file not in self.manifest.files:
                raise BundleError(
                    f"{self.folder}, graph '{entry_name}'",
                    f"file '{graph.file}' is not among the bundle's files",
                    "build the bundle again",
                )

    def digests(self) -> list[str]:
        """Return the names of files whose bytes differ from the manifest; empty when all agree."""
        files = self.manifest.files
        found = sha256_of_each([safe_path(self.folder, name) for name in files])
        return [n for n, digest in zip(files, found, strict=True) if digest != files[n].sha256]

    def damaged(self, place: str, limit: int) -> list[str]:
        """Return the files at or below ``place`` whose bytes differ from the manifest.

        Args:
            place: A file or folder of the bundle.
            limit: Larger files are not looked at, bytes.
        """
        files = self.manifest.files
        names = [
            n
            for n in files
            if (n == place or n.startswith(f"{place}/")) and files[n].bytes <= limit
        ]
        return [n for n in names if sha256_of(self.path(n)) != files[n].sha256]

    def path(self, name: str) -> Path:
        """Return where a file of the bundle lies."""
        return safe_path(self.folder, name)

    def graph_path(self, name: str) -> Path:
        """Return the ONNX file of graph ``name``."""
        if name not in self.manifest.graphs:
            raise BundleError(
                f"{self.folder}, graph '{name}'",
                "is not in the bundle",
                nearest(name, list(self.manifest.graphs)),
            )
        return self.path(self.manifest.graphs[name].file)

    def engines(self, backend: str) -> EngineSetEntry | None:
        """Return the engine set of ``backend``, or None when none was built."""
        return next((e for e in self.manifest.engines if e.backend == backend), None)

    def tensor(self, name: str) -> torch.Tensor:
        """Return a weight, memory-mapped, read only by convention.

        Raises:
            BundleError: no such tensor, or its file is not what the manifest says.
        """
        entry = self.manifest.tensors.get(name)
        if entry is None:
            raise BundleError(
                f"{self.folder}, tensor '{name}'", "is not in the bundle", "build it again"
            )
        try:
            if entry.file not in self._open_files:
                self._open_files[entry.file] = _WeightFile(self.path(entry.file))
            tensor = self._open_files[entry.file].at(entry)
        except (CheckpointError, SafetensorError, OSError, LookupError) as error:
            raise BundleError(
                f"{self.folder}, tensor '{name}'",
                f"can't be read from '{entry.file}': {error}",
                "the file was damaged; build the bundle again",
            ) from error
        if list(tensor.shape) != entry.shape or tensor.dtype != getattr(torch, entry.dtype):
            raise BundleError(
                f"{self.folder}, tensor '{name}'",
                f"is {tensor.dtype} {list(tensor.shape)}, "
                f"the manifest says {entry.dtype} {entry.shape}",
                "build the bundle again",
            )
        return tensor


class _WeightFile:
    """A safetensors file whose tensors are found by place, as the manifest gives it.

    A linked file names its tensors as the checkpoint does: without an expert's prefix, and a tied
    weight by one of its names. A weight may also be a part of a tensor of the file, as the query
    projection is of one that holds query, key and value.
    """

    def __init__(self, path: Path) -> None:
        self._tensors = sorted(read_header(path).values(), key=lambda t: (t.offset, t.bytes))
        self._offsets = [t.offset for t in self._tensors]
        self._file: Any = safe_open(path, framework="pt")

    def at(self, entry: TensorEntry) -> torch.Tensor:
        """Return the tensor at an entry's place; `LookupError` where none of its dtype has it."""
        end = entry.offset + entry.bytes
        index = bisect_right(self._offsets, entry.offset) - 1
        whole = self._tensors[index] if index >= 0 else None
        if whole is None or end > whole.offset + whole.bytes:
            raise LookupError(f"no tensor lies in its {entry.bytes} bytes from {entry.offset}")
        tensor: torch.Tensor = self._file.get_tensor(whole.name)
        if (whole.offset, whole.bytes) == (entry.offset, entry.bytes):
            return tensor
        first, rest = divmod(entry.offset - whole.offset, tensor.element_size())
        if rest or whole.dtype != entry.dtype:
            raise LookupError(f"it is no part of tensor '{whole.name}', which is {whole.dtype}")
        count = entry.bytes // tensor.element_size()
        return tensor.flatten()[first : first + count].view(entry.shape)
