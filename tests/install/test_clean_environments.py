# SPDX-License-Identifier: Apache-2.0
"""The wheel in clean environments: what each extra lets a command do, and what lacks without it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.nightly

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "models" / "shapes_wan"
SHORT = ("--prompt", "a red circle", "--steps", "4", "--frames", "5")

Run = Callable[..., subprocess.CompletedProcess[str]]


def done(*command: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    texts = [str(part) for part in command]
    return subprocess.run(texts, capture_output=True, text=True, check=False, cwd=cwd)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and an environment ``base`` in which it alone was installed."""
    folder = tmp_path_factory.mktemp("install")
    pip = (sys.executable, "-m", "pip")
    source = folder / "source"
    shutil.copytree(
        ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "out", "dist", "*.egg-info")
    )
    arguments = ("wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, source)
    built = done(*pip, *arguments, cwd=folder)
    assert built.returncode == 0, built.stderr
    environment(folder, "base", "freewheel", beside=None)
    return folder


def environment(folder: Path, name: str, wanted: str, *, beside: str | None = "base") -> Path:
    """Make a virtual environment, which may see the packages of another, and install into it."""
    place = folder / name
    done(sys.executable, "-m", "venv", place, cwd=folder)
    if beside is not None:
        (site,) = (folder / beside / "lib").glob("python*/site-packages")
        (own,) = (place / "lib").glob("python*/site-packages")
        (own / "beside.pth").write_text(f"{site}\n", encoding="utf-8")
    (wheel,) = folder.glob("*.whl")
    requirement = wanted.replace("freewheel", f"freewheel @ {wheel.as_uri()}", 1)
    if beside is not None and "[" in wanted:
        requirement = wanted  # as a user types it: the package is there, its extra is not
    constraints = ROOT / "constraints.txt"
    pip = (place / "bin" / "python", "-m", "pip", "install", "-q", "-c", constraints)
    installed = done(*pip, requirement, cwd=folder)
    if "No matching distribution" in installed.stderr or "ConnectionError" in installed.stderr:
        pytest.skip(f"the package index has not all of '{wanted}': {installed.stderr[-200:]}")
    assert installed.returncode == 0, installed.stderr
    return place


@pytest.fixture(scope="module")
def freewheel(place: Path) -> Callable[[str], Run]:
    """Return a function from extras to a command line in an environment with those alone."""

    def of(extras: str) -> Run:
        # Not the package's own name: Python would take the folder for the package.
        name = f"with_{extras.replace(',', '_')}" if extras else "base"
        if not (place / name).exists():
            environment(place, name, f"freewheel[{extras}]")
        return lambda *arguments: done(
            place / name / "bin" / "python", "-m", "freewheel.cli", *arguments, cwd=place
        )

    return of


@pytest.fixture(scope="module")
def bundle(place: Path, freewheel: Callable[[str], Run]) -> Path:
    built = freewheel("openvino")(
        "build",
        MODEL,
        "--out",
        place / "bundle",
        "--config",
        "shapes_wan_teacache",
        "--backend",
        "openvino",
    )
    assert built.returncode == 0, built.stderr
    return place / "bundle"


def test_the_base_shows_what_there_is_and_attaches(
    place: Path, freewheel: Callable[[str], Run]
) -> None:
    run = freewheel("")
    for verb in ("--help", "policies", "configs"):
        assert run(verb).returncode == 0, verb
    found = json.loads(run("doctor", "--json").stdout)
    assert found["auto"] is None
    assert not any(extra["installed"] for extra in found["extras"] if extra["name"] != "serve")
    imported = done(
        place / "base" / "bin" / "python", "-c", "import freewheel; freewheel.attach", cwd=place
    )
    assert imported.returncode == 0, imported.stderr
    told = run("build", MODEL, "--out", "b", "--dry-run")
    assert told.returncode == 4
    assert "pip install openvino" in told.stderr


def test_one_backend_builds_and_runs(bundle: Path, freewheel: Callable[[str], Run]) -> None:
    made = freewheel("openvino")("run", bundle, *SHORT, "--out", "video.gif")
    assert made.returncode == 0, made.stderr
    told = freewheel("openvino")("run", bundle, *SHORT, "--out", "video.mp4")
    assert told.returncode == 4
    planned = freewheel("onnxruntime")("build", MODEL, "--out", "b", "--dry-run")
    assert planned.returncode == 0, planned.stderr


@pytest.mark.parametrize(
    ("extras", "arguments"),
    [
        ("openvino,video", ("run", *SHORT, "--out", "video.mp4")),
        ("openvino,metrics", ("bench", *SHORT[:4], "--rounds", "1")),
        ("openvino,report", ("run", *SHORT, "--out", "v.gif", "--report", "r.html")),
        ("openvino,verify", ("verify",)),
    ],
)
def test_an_extra_is_all_that_its_command_wants(
    bundle: Path, freewheel: Callable[[str], Run], extras: str, arguments: tuple[str, ...]
) -> None:
    verb, *rest = arguments
    made = freewheel(extras)(verb, bundle, *rest)
    assert made.returncode == 0, made.stderr
    lacking = freewheel("openvino")(verb, bundle, *rest)
    assert lacking.returncode == 4
    assert f"pip install 'freewheel[{extras.split(',')[1]}]'" in lacking.stderr


def test_all_has_every_extra_of_any_machine(freewheel: Callable[[str], Run]) -> None:
    found = json.loads(freewheel("all")("doctor", "--json").stdout)
    assert all(extra["installed"] for extra in found["extras"])
    assert found["auto"] in ("openvino", "onnxruntime")
