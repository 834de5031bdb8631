# SPDX-License-Identifier: Apache-2.0
"""What `cmake --install` gives: a program that starts, and a library for C, Python and Rust."""

from __future__ import annotations

import ctypes
import json
import re
import shutil
import subprocess
import tomllib
from ctypes import (
    CFUNCTYPE,
    POINTER,
    byref,
    c_char_p,
    c_double,
    c_float,
    c_int32,
    c_int64,
    c_size_t,
    c_uint64,
    c_void_p,
)
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from freewheel.bundle.reader import Bundle


def run(*command: object, **options: Any) -> subprocess.CompletedProcess[str]:
    texts = [str(part) for part in command]
    return subprocess.run(texts, capture_output=True, text=True, check=False, **options)


PROMPT = "a red circle moving right on a gray background"
HEADER = "cpp/include/freewheel/freewheel.h"

C_PROGRAM = """
#include <freewheel/freewheel.h>
#include <stdio.h>
int main(int argc, char** argv) {
  freewheel_model* model = NULL;
  const char* json = "";
  printf("%s %d.%d.%d\\n", freewheel_version(), FREEWHEEL_VERSION_MAJOR, FREEWHEEL_VERSION_MINOR,
         FREEWHEEL_VERSION_PATCH);
  if (argc < 2) return 0;
  if (freewheel_model_create(argv[1], NULL, &model) == FREEWHEEL_OK)
    freewheel_model_describe(model, &json);
  printf("%s\\n", json);
  freewheel_model_destroy(model);
  return 0;
}
"""


@pytest.fixture(scope="module")
def version(repository: Path) -> str:
    project = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return str(project["version"])


@pytest.fixture(scope="module")
def shared(cpp_build: Path) -> Path:
    """The shared library, linked from the objects of the static one."""
    built = run("ninja", "-C", cpp_build, "freewheel_shared")
    assert built.returncode == 0, built.stdout
    return cpp_build / "libfreewheel.so"


@pytest.fixture(scope="module")
def prefix(cpp_build: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An installation in a folder that was moved afterwards."""
    folder = tmp_path_factory.mktemp("installed")
    installed = run("cmake", "--install", cpp_build, "--prefix", folder / "first")
    assert installed.returncode == 0, installed.stderr
    return (folder / "first").rename(folder / "moved")


def test_the_installed_program_starts(prefix: Path, version: str) -> None:
    done = run(prefix / "bin" / "freewheel-run", "--version", env={})
    assert (done.returncode, done.stdout.strip()) == (0, f"freewheel-run {version}"), done.stderr


def test_a_c_program_links_by_pkg_config(
    prefix: Path, version: str, demo_bundle: Bundle, tmp_path: Path
) -> None:
    if shutil.which("pkg-config") is None:
        pytest.skip("pkg-config is not installed")
    (places,) = {p.parent for p in prefix.rglob("freewheel.pc")}
    flags = run(
        "pkg-config",
        "--cflags",
        "--libs",
        "--static",
        "freewheel",
        env={"PKG_CONFIG_PATH": str(places), "PATH": "/usr/bin:/bin"},
    )
    assert flags.returncode == 0, flags.stderr
    assert_c_program_runs(flags.stdout.split(), version, demo_bundle, tmp_path)


def assert_c_program_runs(flags: list[str], version: str, bundle: Bundle, folder: Path) -> None:
    (folder / "main.c").write_text(C_PROGRAM, encoding="utf-8")
    strict = ("-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror")
    built = run("cc", *strict, folder / "main.c", "-o", folder / "main", *flags)
    assert built.returncode == 0, built.stderr
    done = run(folder / "main", bundle.folder, env={})
    assert done.returncode == 0, done.stderr
    first, _, description = done.stdout.partition("\n")
    assert first == f"{version} {version}"
    assert "teacache" in json.loads(description)["policies"]


def test_the_shared_library_exports_the_c_abi_alone(
    shared: Path, repository: Path, version: str
) -> None:
    symbols = run("nm", "-D", "--defined-only", "--without-symbol-versions", shared).stdout
    exported = {line.split()[-1] for line in symbols.splitlines() if " A " not in line}
    header = (repository / HEADER).read_text(encoding="utf-8")
    declared = set(re.findall(r"\b(freewheel_\w+)\(", header))
    assert exported == declared
    assert len(declared) > 10
    name = run("readelf", "-d", shared).stdout
    assert f"soname: [libfreewheel.so.{version.rsplit('.', 1)[0]}]" in name


class Prompt(ctypes.Structure):
    _fields_ = [
        ("branch", c_char_p),
        ("input", c_char_p),
        ("data", POINTER(c_float)),
        ("shape", POINTER(c_int64)),
        ("rank", c_int32),
    ]


class Progress(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        ("branch", c_char_p),
        ("step_index", c_int64),
        ("steps", c_int64),
        ("computed", c_int32),
        ("distance", c_double),
        ("seconds", c_double),
    ]


OnStep = CFUNCTYPE(ctypes.c_int, POINTER(Progress), c_void_p)


class RunOptions(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_size_t), ("latents", POINTER(c_float)),
        ("latents_shape", POINTER(c_int64)), ("latents_rank", c_int32), ("prompt_count", c_int32),
        ("prompts", POINTER(Prompt)), ("steps", c_int64), ("guidance_scale", c_double),
        ("flow_shift", c_double), ("sampler", c_char_p), ("cache", c_char_p),
        ("parameters", c_void_p), ("parameter_count", c_int32), ("has_seed", c_int32),
        ("seed", c_uint64), ("progress", OnStep), ("user", c_void_p),
        ("condition", POINTER(c_float)), ("condition_channels", c_int64),
        ("guidance_scale_2", c_double), ("has_config_seed", c_int32), ("force", c_int32),
        ("prompt", c_char_p), ("negative_prompt", c_char_p), ("lora", c_char_p),
    ]  # fmt: skip


def test_python_runs_a_bundle_through_ctypes(shared: Path, demo_bundle: Bundle) -> None:
    library = ctypes.CDLL(str(shared))
    library.freewheel_model_last_error.restype = c_char_p
    library.freewheel_session_last_error.restype = c_char_p
    model, session = c_void_p(), c_void_p()
    folder = str(demo_bundle.folder).encode()
    opened = library.freewheel_model_create(folder, None, byref(model))
    assert opened == 0, library.freewheel_model_last_error(model)
    assert library.freewheel_session_create(model, byref(session)) == 0
    shape, rank = (c_int64 * 8)(), c_int32()
    sizes = (c_int64(5), c_int64(64), c_int64(64))
    assert library.freewheel_model_latents_shape(model, b"", *sizes, shape, byref(rank)) == 0
    latents = np.zeros(list(shape)[: rank.value], dtype=np.float32)
    text = np.full((1, 16, 128), 0.1, dtype=np.float32)
    numbers = POINTER(c_float)
    prompt = Prompt(
        b"cond", b"text_states", text.ctypes.data_as(numbers), (c_int64 * 3)(*text.shape), 3
    )
    seen: list[tuple[int, int]] = []

    def on_step(progress, _):
        seen.append((progress.contents.step_index, progress.contents.computed))
        return 0

    options = RunOptions(
        struct_size=ctypes.sizeof(RunOptions),
        latents=latents.ctypes.data_as(numbers),
        latents_shape=shape,
        latents_rank=rank,
        prompt_count=1,
        prompts=ctypes.pointer(prompt),
        steps=6,
        guidance_scale=1.0,
        cache=b"taylorseer",
        has_seed=1,
        seed=7,
        progress=OnStep(on_step),
    )
    done = library.freewheel_session_run(session, byref(options))
    assert done == 0, library.freewheel_session_last_error(session)
    # An interval of 4: steps 0 and 4 are computed.
    assert seen == [(0, 1), (1, 0), (2, 0), (3, 0), (4, 1), (5, 0)]
    assert np.isfinite(latents).all()
    assert latents.std() > 0.1
    library.freewheel_session_destroy(session)
    library.freewheel_model_destroy(model)


def test_a_sentence_becomes_frames_through_ctypes(shared: Path, whole_bundle: Bundle) -> None:
    library = ctypes.CDLL(str(shared))
    library.freewheel_model_last_error.restype = c_char_p
    library.freewheel_session_last_error.restype = c_char_p
    numbers = POINTER(c_float)
    model, session = c_void_p(), c_void_p()
    assert (
        library.freewheel_model_create(str(whole_bundle.folder).encode(), None, byref(model)) == 0
    )
    assert library.freewheel_session_create(model, byref(session)) == 0

    def said() -> str:
        return library.freewheel_model_last_error(model).decode()

    text_shape = (c_int64 * 3)()
    assert library.freewheel_model_text_shape(model, None, text_shape) == 0, said()
    assert list(text_shape) == [1, 16, 128]

    def encoded(text: bytes | None, ids: list[int]) -> np.ndarray:
        states = np.empty(list(text_shape), np.float32)
        held = (c_int64 * max(1, len(ids)))(*ids)
        done = library.freewheel_model_encode(
            model, None, text, held, c_int64(len(ids)), states.ctypes.data_as(numbers)
        )
        assert done == 0, said()
        return states

    ids = AutoTokenizer.from_pretrained(whole_bundle.path("pipeline/tokenizer"))(PROMPT).input_ids
    states = encoded(PROMPT.encode(), [])
    np.testing.assert_array_equal(states, encoded(None, ids))
    assert np.abs(states[0, : len(ids)]).min(axis=-1).max() > 0
    assert not states[0, len(ids) :].any()

    shape, rank = (c_int64 * 8)(), c_int32()
    sizes = (c_int64(0), c_int64(0), c_int64(0))
    assert library.freewheel_model_latents_shape(model, None, *sizes, shape, byref(rank)) == 0
    results = []
    for options in ({"prompt": PROMPT.encode()}, {"prompts": states}):
        latents = np.zeros(list(shape)[: rank.value], np.float32)
        given = dict(options)
        if "prompts" in options:
            empty = encoded(b"", [])
            given["prompts"] = (Prompt * 2)(
                *(
                    Prompt(b, b"text_states", s.ctypes.data_as(numbers), text_shape, 3)
                    for b, s in ((b"cond", states), (b"uncond", empty))
                )
            )
            given["prompt_count"] = 2
        run_options = RunOptions(
            struct_size=ctypes.sizeof(RunOptions),
            latents=latents.ctypes.data_as(numbers),
            latents_shape=shape,
            latents_rank=rank,
            steps=2,
            guidance_scale=3.0,
            cache=b"off",
            has_seed=1,
            seed=7,
            **given,
        )
        done = library.freewheel_session_run(session, byref(run_options))
        assert done == 0, library.freewheel_session_last_error(session)
        results.append(latents)
    np.testing.assert_array_equal(results[0], results[1])

    frames_shape = (c_int64 * 5)()
    assert library.freewheel_model_frames_shape(model, shape, rank, frames_shape) == 0, said()
    assert list(frames_shape) == [1, 17, 96, 96, 3]
    frames = np.zeros(list(frames_shape), np.uint8)
    decoded = library.freewheel_model_decode(
        model, results[0].ctypes.data_as(numbers), shape, rank, frames.ctypes.data_as(c_void_p)
    )
    assert decoded == 0, said()
    assert frames.std() > 10
    other = (c_int64 * 5)(1, 16, 1, 4, 4)
    assert library.freewheel_model_frames_shape(model, other, 5, frames_shape) != 0
    assert "it was compiled for [1, 16, 5, 12, 12]" in said()
    library.freewheel_session_destroy(session)
    library.freewheel_model_destroy(model)


def test_a_rust_program_opens_a_bundle(
    shared: Path, version: str, demo_bundle: Bundle, tmp_path: Path
) -> None:
    if shutil.which("rustc") is None or run("rustc", "--version").returncode:
        pytest.skip("rustc is not installed")
    source = Path(__file__).with_name("opens.rs")
    built = run(
        "rustc", "--edition", "2021", "-D", "warnings", "-L", shared.parent, "-C",
        f"link-arg=-Wl,-rpath,{shared.parent}", "-o", tmp_path / "opens", source,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    done = run(tmp_path / "opens", demo_bundle.folder, tmp_path)
    first, opened, refused = done.stdout.splitlines()
    assert first == f"version {version}"
    assert "teacache" in json.loads(opened.removeprefix("ok: "))["policies"]
    assert re.match(r"bundle: .*manifest\.json: ", refused)


@pytest.mark.nightly
def test_a_shared_installation_is_found_by_cmake_and_pkg_config(
    repository: Path, cmake_arguments: list[str], version: str, demo_bundle: Bundle, tmp_path: Path
) -> None:
    build, prefix = tmp_path / "build", tmp_path / "prefix"
    off = (f"-DFREEWHEEL_{part}=OFF" for part in ("TESTS", "TRITON", "TOOLS"))
    steps = (
        (
            "cmake",
            "-S",
            repository / "cpp",
            "-B",
            build,
            *cmake_arguments,
            "-DBUILD_SHARED_LIBS=ON",
            *off,
        ),
        ("ninja", "-C", build),
        ("cmake", "--install", build, "--prefix", prefix),
    )
    for step in steps:
        done = run(*step)
        assert done.returncode == 0, done.stdout + done.stderr
    assert not list(prefix.rglob("*.a"))
    assert {p.name for p in prefix.rglob("*.h")} == {"freewheel.h", "version.h"}
    (library,) = {p.parent for p in prefix.rglob("libfreewheel.so")}
    flags = run("pkg-config", "--cflags", "--libs", library / "pkgconfig" / "freewheel.pc")
    (tmp_path / "c").mkdir()
    linked = [*flags.stdout.split(), f"-Wl,-rpath,{library}"]
    assert_c_program_runs(linked, version, demo_bundle, tmp_path / "c")

    source = tmp_path / "found"
    source.mkdir()
    (source / "main.c").write_text(C_PROGRAM, encoding="utf-8")
    (source / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.22)\nproject(found LANGUAGES C)\n"
        f"find_package(freewheel {version} REQUIRED)\nadd_executable(found main.c)\n"
        "target_link_libraries(found PRIVATE freewheel::freewheel)\n",
        encoding="utf-8",
    )
    configured = run(
        "cmake", "-S", source, "-B", source / "b", "-G", "Ninja", f"-DCMAKE_PREFIX_PATH={prefix}"
    )
    assert configured.returncode == 0, configured.stderr
    assert run("ninja", "-C", source / "b").returncode == 0
    assert run(source / "b" / "found").stdout.startswith(f"{version} {version}")
