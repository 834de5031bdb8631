"""The C++ suite itself, hostile bundles, and a program outside that uses the installed library."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from freewheel import __version__
from freewheel.bundle.reader import Bundle

pytestmark = [pytest.mark.openvino, pytest.mark.slow]

CLANG_FORMAT = 14
"""Versions break lines otherwise; this is Debian 12's."""


def run(*command: object, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False, **options
    )


@pytest.fixture(scope="module")
def embeddings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("embeddings") / "cond.npy"
    np.save(path, np.full((1, 8, 128), 0.1, np.float32))
    return path


@pytest.fixture
def damaged(demo_bundle: Bundle, linked_bundle: Callable[..., Path]) -> Path:
    """A copy of the bundle whose small files may be changed."""
    return linked_bundle(demo_bundle)


def change_manifest(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    change(manifest)
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def refused(
    build: Path,
    bundle: Path,
    embeddings: Path,
    *,
    cache: str = "taylorseer",
    backend: str = "openvino",
) -> tuple[int, dict]:
    done = run(
        build / "freewheel-run", bundle, "--out", bundle.parent / "x.npy",
        "--embeddings", embeddings, "--guidance", 1, "--steps", 4,
        "--frames", 1, "--height", 32, "--width", 32, "--cache", cache, "--backend", backend,
        "--shift", 3, "--quiet", "--json",
    )  # fmt: skip
    error = json.loads(done.stdout)["error"]
    assert error["where"]
    assert error["hint"]
    return done.returncode, error


def test_the_c_plus_plus_suite_passes(cpp_build: Path, demo_bundle: Bundle) -> None:
    """Every program that ctest knows, once: ctest starts it anew for each of its tests."""
    listed = json.loads(run("ctest", "--test-dir", cpp_build, "--show-only=json-v1").stdout)
    programs = sorted({test["command"][0] for test in listed["tests"]})
    assert len(programs) == 3, programs
    environment = {**os.environ, "FREEWHEEL_TEST_BUNDLE": str(demo_bundle.folder)}
    for program in programs:
        done = run(program, "--gtest_brief=1", env=environment)
        assert done.returncode == 0, done.stdout[-4000:]
        assert "[  PASSED  ]" in done.stdout


@pytest.mark.nightly
def test_a_hundred_runs_don_t_grow(cpp_build: Path, demo_bundle: Bundle) -> None:
    environment = {
        **os.environ,
        "FREEWHEEL_TEST_BUNDLE": str(demo_bundle.folder),
        "FREEWHEEL_SOAK_RUNS": "100",
    }
    program = cpp_build / "tests" / "freewheel_tests"
    done = run(program, "--gtest_filter=*Soak*", env=environment)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "[  PASSED  ] 1 test" in done.stdout


def test_the_tool_names_its_version(cpp_build: Path) -> None:
    done = run(cpp_build / "freewheel-run", "--version")
    assert (done.returncode, done.stdout.strip()) == (0, f"freewheel-run {__version__}")


def test_a_corrupt_manifest_is_refused(cpp_build, damaged, embeddings) -> None:
    text = (damaged / "manifest.json").read_text()
    (damaged / "manifest.json").write_text(text[: len(text) // 2])
    code, error = refused(cpp_build, damaged, embeddings)
    assert (code, error["code"]) == (3, "bundle")


def test_a_missing_engine_is_named(cpp_build, damaged, embeddings) -> None:
    folder = next((damaged / "engines").glob("openvino-*")) / "reuse"
    shutil.rmtree(folder)
    code, error = refused(cpp_build, damaged, embeddings)
    assert code == 3
    assert "reuse" in error["message"]


def test_a_path_that_escapes_is_refused(cpp_build, damaged, embeddings) -> None:
    def escape(manifest: dict[str, Any]) -> None:
        manifest["files"]["../outside"] = {"bytes": 1, "sha256": "0" * 64}

    change_manifest(damaged, escape)
    code, error = refused(cpp_build, damaged, embeddings)
    assert code == 3
    assert "leaves the bundle's folder" in error["message"]


def test_a_tensor_of_another_size_is_refused(cpp_build, damaged, embeddings) -> None:
    def shrink(manifest: dict[str, Any]) -> None:
        next(iter(manifest["tensors"].values()))["bytes"] -= 4

    change_manifest(damaged, shrink)
    code, error = refused(cpp_build, damaged, embeddings)
    assert code == 3
    assert "its shape implies" in error["message"]


def test_an_engine_for_another_machine_is_refused(cpp_build, damaged, embeddings) -> None:
    record = next((damaged / "engines").glob("openvino-*")) / "head" / "engine.json"
    text = record.read_text()
    machine = json.loads(text)["machine"]
    record.write_text(text.replace(machine, "z" * len(machine)))
    code, error = refused(cpp_build, damaged, embeddings)
    assert code == 3
    assert (
        f"compiled for machine '{'z' * len(machine)}', but here it is '{machine}'"
        in error["message"]
    )


def test_an_engine_is_loaded_in_the_recorded_precision(cpp_build, damaged, embeddings) -> None:
    record = next((damaged / "engines").glob("openvino-*")) / "head" / "engine.json"
    text = record.read_text()
    record.write_text(text.replace('"computed_in": "float32"', '"computed_in": "float99"'))
    code, error = refused(cpp_build, damaged, embeddings)
    assert code == 3
    assert "details.computed_in': is 'float99', not one of float32" in error["message"]


def test_engines_for_another_machine_are_compiled_anew_where_asked(
    cpp_build, damaged, embeddings
) -> None:
    for record in next((damaged / "engines").glob("openvino-*")).glob("*/engine.json"):
        text = record.read_text()
        machine = json.loads(text)["machine"]
        record.write_text(text.replace(machine, "z" * len(machine)))
    done = run(
        cpp_build / "freewheel-run", damaged, "--out", damaged.parent / "x.npy", "--embeddings",
        embeddings, "--guidance", 1, "--steps", 4, "--frames", 1, "--height", 32, "--width", 32,
        "--cache", "custom", "--backend", "openvino", "--shift", 3, "-q", "--allow-compile",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_backend_without_engines_is_unavailable(cpp_build, damaged, embeddings) -> None:
    code, error = refused(cpp_build, damaged, embeddings, backend="tensorrt")
    assert (code, error["code"]) == (4, "backend")


def test_an_unknown_policy_names_the_nearest(cpp_build, damaged, embeddings) -> None:
    code, error = refused(cpp_build, damaged, embeddings, cache="tecache")
    assert (code, error["code"]) == (3, "config")
    assert "did you mean" in error["hint"]


def test_an_interrupt_cancels(cpp_build, demo_bundle, embeddings, tmp_path) -> None:
    command = [
        cpp_build / "freewheel-run", demo_bundle.folder, "--out", tmp_path / "x.npy",
        "--embeddings", embeddings, "--guidance", 1, "--steps", 60,
        "--frames", 81, "--height", 256, "--width", 256,
        "--cache", "off", "--shift", 3,
    ]  # fmt: skip
    process = subprocess.Popen(
        [str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert "step 1/60" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, text = process.communicate()
    assert process.returncode == 130
    assert "was cancelled" in text
    assert "step 60/60" not in text
    assert not (tmp_path / "x.npy").exists()


def test_an_installed_library_is_found(
    cpp_build, cmake_arguments, repository, whole_bundle, tmp_path
) -> None:
    """And the program of the docs goes from a sentence to pictures."""
    installed = run("cmake", "--install", cpp_build, "--prefix", tmp_path / "prefix")
    assert installed.returncode == 0, installed.stderr
    source, build = repository / "examples" / "embed", tmp_path / "embed"
    configured = run(
        "cmake",
        "-S",
        source,
        "-B",
        build,
        *cmake_arguments,
        f"-DCMAKE_PREFIX_PATH={tmp_path / 'prefix'}",
    )
    assert configured.returncode == 0, configured.stderr
    built = run("ninja", "-C", build)
    assert built.returncode == 0, built.stdout
    (tmp_path / "pictures").mkdir()
    done = run(build / "embed", whole_bundle.folder, "a red circle", tmp_path / "pictures")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["branches"]["cond"]["computed"][:3] == [True, False, True]
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 17
    refused = run(build / "embed", whole_bundle.folder, "red " * 99, tmp_path / "pictures")
    assert "are 100, expected 1 to 16" in refused.stderr


def test_sources_are_formatted(repository: Path) -> None:
    if shutil.which("clang-format") is None:
        pytest.skip("clang-format is not installed")
    version = run("clang-format", "--version").stdout
    if f"version {CLANG_FORMAT}." not in version:
        pytest.skip(f"sources are formatted by version {CLANG_FORMAT}, this is {version.strip()}")
    folders = [repository / "cpp", repository / "examples" / "embed"]
    sources = [p for f in folders for p in f.rglob("*") if p.suffix in (".h", ".cpp", ".c")]
    done = run(
        "clang-format",
        f"--style=file:{repository}/cpp/.clang-format",
        "--dry-run",
        "--Werror",
        *sources,
    )
    assert done.returncode == 0, done.stderr[-2000:]
