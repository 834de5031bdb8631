# SPDX-License-Identifier: Apache-2.0
"""What a compiled engine is and where it may run: the `engine.json` beside its files.

An engine is a folder. It appears whole or not at all, and a file whose size is not the recorded
one is never handed to a runtime.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..core.errors import BundleError
from ..core.output import replaced_whole
from ..core.strict_json import parse_json
from .base import TensorSpec

__all__ = [
    "REBUILD",
    "RECORD_NAME",
    "SCHEMA_VERSION",
    "EngineRecord",
    "engine_folder",
]

RECORD_NAME = "engine.json"
SCHEMA_VERSION = 1
REBUILD = "rebuild the engines on this machine with 'freewheel build'"


@dataclass(frozen=True)
class EngineRecord:
    """The content of `engine.json`.

    Attributes:
        backend: Name in `BACKENDS`.
        version: Version of the runtime that compiled it.
        machine: What the engine depends on besides the version; empty when it runs anywhere.
        precision: Precision asked for.
        inputs: Input name → dtype and shape, as the ONNX graph names them.
        outputs: Likewise for outputs.
        files: File name in the folder → size in bytes.
        details: Whatever else the backend wants to remember or show in `inspect`.
    """

    backend: str
    version: str
    machine: str
    precision: str
    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    files: Mapping[str, int] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write `engine.json` into ``folder``, with the sizes of all files found there."""
        files = {p.name: p.stat().st_size for p in sorted(folder.iterdir()) if p.is_file()}
        content = {"schema_version": SCHEMA_VERSION, **asdict(self), "files": files}
        (folder / RECORD_NAME).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> EngineRecord:
        """Read `engine.json` and check the files it lists.

        Raises:
            BundleError: the folder is no engine, is of a newer schema, or a file is missing, of
                another size or named outside the folder.
        """
        path = folder / RECORD_NAME
        try:
            content = parse_json(path.read_bytes())
            schema = content.pop("schema_version")
            if schema != SCHEMA_VERSION:
                what = f"schema version is {schema}, this freewheel reads {SCHEMA_VERSION}"
                raise BundleError(str(path), what, "use the freewheel that built it, or rebuild")
            content["inputs"] = _specs(content["inputs"])
            content["outputs"] = _specs(content["outputs"])
            record = cls(**content)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as fault:
            what = f"not a readable engine record ({type(fault).__name__}: {fault})"
            raise BundleError(str(path), what, REBUILD) from fault
        for name, size in record.files.items():
            _check_file(folder, name, size)
        return record

    def require(self, folder: Path, *, backend: str, version: str, machine: str = "") -> None:
        """Refuse an engine that was compiled for something else.

        Raises:
            BundleError: backend, version or machine differ from the recorded ones.
        """
        here = {"backend": backend, "version": version, "machine": machine}
        for name, found in here.items():
            compiled = getattr(self, name)
            if compiled != found:
                what = f"compiled for {name} '{compiled}', but here it is '{found}'"
                raise BundleError(str(folder), what, REBUILD)


@contextmanager
def engine_folder(out: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes ``out`` when the block ends, and vanishes if it raises.

    Raises:
        OutputError: the disk is full or the place can't be written.
    """
    with replaced_whole(out, "free some space or choose another --out") as folder:
        folder.mkdir()
        yield folder


def _specs(content: dict[str, Any]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(s["dtype"], tuple(s["shape"])) for name, s in content.items()}


def _check_file(folder: Path, name: str, size: int) -> None:
    where = f"{folder / RECORD_NAME}, file '{name}'"
    if Path(name).name != name or name == "..":
        raise BundleError(where, "the name leaves the engine's folder", REBUILD)
    path = folder / name
    found = path.stat().st_size if path.is_file() else None
    if found != size:
        state = "the file is missing" if found is None else f"the file has {found} bytes"
        raise BundleError(where, f"{state}, {size} bytes were written", REBUILD)
