"""What is fuzzed: every Python reader of files that nobody vouches for, as a function of bytes.

A reader may refuse what it is given with an error of the project; anything else is a finding.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from freewheel.bundle.reader import parse_manifest
from freewheel.bundle.safetensors_header import read_header
from freewheel.configs.load import load_config
from freewheel.core.errors import FreewheelError
from freewheel.engines.record import EngineRecord
from freewheel.tuning.trace import load_trace

Reader = Callable[[bytes], object]


def of_file(read: Callable[[Path], object]) -> Reader:
    """Make a reader of a path one of bytes; they lie in a file without a name."""
    handle = os.memfd_create("fuzz")

    def reader(content: bytes) -> object:
        os.ftruncate(handle, 0)
        os.pwrite(handle, content, 0)
        return read(Path(f"/proc/self/fd/{handle}"))

    return reader


def engine_record(content: bytes) -> object:
    folder = Path(f"/dev/shm/freewheel-fuzz-{os.getpid()}")
    folder.mkdir(exist_ok=True)
    try:
        (folder / "engine.json").write_bytes(content)
        return EngineRecord.read(folder)
    finally:
        (folder / "engine.json").unlink()
        folder.rmdir()


READERS: dict[str, Reader] = {
    "manifest": lambda content: parse_manifest(content, "manifest.json"),
    "config": of_file(load_config),
    "safetensors": of_file(read_header),
    "engine_record": engine_record,
    "trace": of_file(load_trace),
}


def outcome(name: str, content: bytes) -> str:
    """Return ``read``, or the message of the project's error that refused ``content``."""
    try:
        READERS[name](content)
    except FreewheelError as error:
        return str(error) if error.where and error.what else ""
    return "read"
