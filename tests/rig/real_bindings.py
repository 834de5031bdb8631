# SPDX-License-Identifier: Apache-2.0
"""TensorRT's own Python bindings, importable where there is neither a GPU nor an NVIDIA library.

The wheel of the bindings is one extension module and links nine C functions of three libraries.
Libraries that export nothing else, and return null, let it import: every class, method, signature
and enumeration is then the real one, and nothing can be built or run.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from types import ModuleType

NEWEST = "11.4.0.106"
OLDEST = "10.15.1.29"
"""The first release that has every operator of our graphs, and what pyproject.toml asks for."""

PACKAGE = "tensorrt-cu13-bindings"
MODULE = "tensorrt_bindings"
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
FOLDER = Path(__file__).resolve().parents[2] / "build" / "tensorrt-bindings"

STUB = """
void *createInferBuilder_INTERNAL(void *logger, int version) { return 0; }
void *createInferRefitter_INTERNAL(void *engine, void *logger, int version) { return 0; }
void *createInferRuntime_INTERNAL(void *logger, int version) { return 0; }
void *getBuilderPluginRegistry(int capability) { return 0; }
void *getPluginRegistry(void) { return 0; }
int initLibNvInferPlugins(void *logger, const char *space) { return 1; }
void *createNvOnnxParser_INTERNAL(void *network, void *logger, int version) { return 0; }
void *createNvOnnxParserRefitter_INTERNAL(void *refitter, void *logger, int version) { return 0; }
int getNvOnnxParserVersion(void) { return 0; }
"""


class BindingsUnavailable(Exception):
    """The wheel can't be had or the stub can't be compiled; the text says why."""


@functools.cache
def bindings(version: str) -> ModuleType:
    """Import the bindings of one release; several may be imported in one process.

    Raises:
        BindingsUnavailable: there is no network, no wheel for this Python, or no C compiler.
    """
    folder = FOLDER / f"{version}-{sys.implementation.cache_tag}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as partial:
            _fetch(version, Path(partial))
            _compile(version, Path(partial))
            _publish(Path(partial), folder)
    for name in LIBRARIES:
        ctypes.CDLL(str(folder / _library(name, version)))
    hidden = {n: sys.modules.pop(n) for n in list(sys.modules) if n.split(".")[0] == MODULE}
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(MODULE)
    finally:
        sys.path.remove(str(folder))
        for name in [n for n in sys.modules if n.split(".")[0] == MODULE]:
            del sys.modules[name]
        sys.modules.update(hidden)


def pack(version: str, folder: Path, tag: str, python: str | None) -> None:
    """Make the bindings for another machine's Python: its tag in file names, and its version."""
    target = folder / f"{version}-{tag}"
    if not target.is_dir():
        target.mkdir(parents=True)
        _fetch(version, target, python)
        _compile(version, target)


def _fetch(version: str, folder: Path, python: str | None = None) -> None:
    other = ["--python-version", python, "--platform", "manylinux_2_28_x86_64"] if python else []
    command = [
        sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:",
        "--disable-pip-version-check", *other, "-d", str(folder), f"{PACKAGE}=={version}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise BindingsUnavailable(f"{PACKAGE} {version} can't be downloaded: {last}")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    wheel.unlink()


def _compile(version: str, folder: Path) -> None:
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang", "g++"))), None)
    if compiler is None:
        raise BindingsUnavailable("no C compiler to make the stub of TensorRT's libraries with")
    source = folder / "stub.c"
    source.write_text(STUB, encoding="ascii")
    for name in LIBRARIES:
        library = _library(name, version)
        command = [compiler, "-x", "c", "-w", "-shared", "-fPIC", f"-Wl,-soname,{library}",
                   str(source), "-o", str(folder / library)]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BindingsUnavailable(f"the stub can't be compiled: {done.stderr.strip()}")


def _library(name: str, version: str) -> str:
    return f"lib{name}.so.{version.split('.')[0]}"


def _publish(partial: Path, folder: Path) -> None:
    """Make what is finished appear at once; another process may have been faster."""
    whole = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.copytree(partial, whole)
    try:
        whole.rename(folder)
    except OSError:
        shutil.rmtree(whole)
