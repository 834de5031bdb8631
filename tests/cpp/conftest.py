"""Build libfreewheel once for the tests that run it, and bundles that differ in a little."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from freewheel.bundle.reader import Bundle
from freewheel.policies import POLICIES
from freewheel.runtime.settings import config_entries

# The models of the families' tests, and the loop that several files compare.
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "compiler"))
sys.path.insert(0, str(Path(__file__).parent.parent / "compiler" / "models"))
sys.path.insert(0, str(Path(__file__).parent.parent / "compiler" / "cut"))
from loop import BY_CONTENT


@pytest.fixture(scope="module")
def asked_policies(request: pytest.FixtureRequest) -> list[str] | None:
    """The policies that a file's tests of this session ask bundles for; None is all that a model can have."""
    here = (i for i in request.session.items if i.path == request.path and hasattr(i, "callspec"))
    named = {i.callspec.params.get("policy") for i in here} & {*POLICIES}
    return None if named == {*POLICIES} else [BY_CONTENT.policy, *named]


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
    """The build folder of `cpp/`, up to date; one worker builds it."""
    build = repository / "build" / "cpp"
    build.mkdir(parents=True, exist_ok=True)
    with (build / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return up_to_date(build, repository / "cpp", cmake_arguments)


def up_to_date(build: Path, source: Path, cmake_arguments: list[str]) -> Path:
    configured = run("cmake", "-S", source, "-B", build, *cmake_arguments)
    for package in ("nlohmann_json", "GTest", "CLI11"):
        if configured.returncode and package in configured.stderr:
            pytest.skip(f"the C++ package {package} is not installed")
    assert configured.returncode == 0, configured.stderr
    built = run("ninja", "-C", build)
    assert built.returncode == 0, built.stdout[-4000:]
    return build


@pytest.fixture(scope="session")
def linked_bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that copies a bundle, changes its manifest and returns the folder.

    Small files may be changed then; large ones are hard links.
    """

    def link_or_copy(source: str, target: str) -> None:
        if Path(source).stat().st_size > 1 << 20:
            os.link(source, target)
        else:
            shutil.copyfile(source, target)

    def link(bundle: Bundle, change: Callable[[dict[str, Any]], None] | None = None) -> Path:
        folder = tmp_path_factory.mktemp("linked") / "b"
        shutil.copytree(bundle.folder, folder, copy_function=link_or_copy)
        if change is not None:
            manifest = json.loads((folder / "manifest.json").read_text())
            change(manifest)
            (folder / "manifest.json").write_text(json.dumps(manifest))
        return folder

    return link


@pytest.fixture(scope="session")
def whole_bundle(repository: Path, build_bundle: Callable[..., Bundle]) -> Bundle:
    """The demo model with its text encoder and VAE, for OpenVINO."""
    configs = config_entries(["shapes_wan_teacache"], lambda text: None)
    return build_bundle(
        repository / "models" / "shapes_wan",
        ("openvino",),
        configs=configs,
        with_text_encoder=True,
        with_vae=True,
    )
