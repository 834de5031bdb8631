"""Build libfreewheel once for the tests that run it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest


def run(*command: object, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False, **options
    )


def missing_tool() -> str | None:
    for tool in ("cmake", "ninja"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed"
    if shutil.which("c++") is None:
        return "no C++ compiler is installed"
    try:
        from openvino.utils import get_cmake_path
    except ImportError:
        return "the package 'openvino' is not installed"
    if not Path(get_cmake_path()).is_dir():
        return "the package 'openvino' has no CMake files"
    return None


@pytest.fixture(scope="session")
def cmake_arguments() -> list[str]:
    reason = missing_tool()
    if reason is not None:
        pytest.skip(reason)
    from openvino.utils import get_cmake_path

    return ["-G", "Ninja", f"-DOpenVINO_DIR={get_cmake_path()}"]


@pytest.fixture(scope="session")
def cpp_build(repository: Path, cmake_arguments: list[str]) -> Path:
    """The build folder of `cpp/`, up to date."""
    build = repository / "build" / "cpp"
    configured = run("cmake", "-S", repository / "cpp", "-B", build, *cmake_arguments)
    for package in ("nlohmann_json", "GTest", "CLI11"):
        if configured.returncode and package in configured.stderr:
            pytest.skip(f"the C++ package {package} is not installed")
    assert configured.returncode == 0, configured.stderr
    built = run("ninja", "-C", build)
    assert built.returncode == 0, built.stdout[-4000:]
    return build
