# SPDX-License-Identifier: Apache-2.0
"""What only an NVIDIA GPU can show; ``make test-gpu`` runs all of it and writes docs/gpu-report.md.

Without a GPU every test is skipped with its backend's own reason. ``pytest tests/gpu --rehearse
openvino`` runs on a CPU backend what needs no CUDA, and writes its report to out/: that shows that
the tests work, and nothing about GPUs.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from freewheel.bundle.reader import Bundle
from freewheel.engines import backend_class

ROOT = Path(__file__).resolve().parents[2]
GPU_BACKENDS = ("tensorrt", "tensorrt-rtx")

sys.path.insert(0, str(Path(__file__).parent))

from gpu_report import Report  # noqa: E402  # found through the line above

REPORT = pytest.StashKey[Report]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[REPORT] = Report()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "engines" in metafunc.fixturenames:
        rehearsed = metafunc.config.getoption("--rehearse")
        names = (rehearsed,) if rehearsed else GPU_BACKENDS
        metafunc.parametrize("engines", names, indirect=True, scope="session")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    outcome: pytest.TestReport = yield
    if outcome.when == "call" or outcome.outcome != "passed":
        reason = ""
        if outcome.skipped and isinstance(outcome.longrepr, tuple):
            reason = f": {outcome.longrepr[2].removeprefix('Skipped: ')}"
        item.config.stash[REPORT].outcomes[item.name] = outcome.outcome + reason
    return outcome


def pytest_sessionfinish(session: pytest.Session) -> None:
    report, rehearsed = session.config.stash[REPORT], session.config.getoption("--rehearse")
    if not any(o in ("passed", "failed") for o in report.outcomes.values()):
        return  # Everything was skipped: there is nothing to report.
    if rehearsed:
        path, command = (
            ROOT / "out" / "gpu-rehearsal.md",
            f"pytest tests/gpu --rehearse {rehearsed}",
        )
    else:
        path, command = ROOT / "docs" / "gpu-report.md", "make test-gpu"
    path.parent.mkdir(exist_ok=True)
    path.write_text(report.markdown(command), encoding="utf-8")


@pytest.fixture(scope="session")
def engines(request: pytest.FixtureRequest) -> str:
    """Name of a backend that runs here."""
    found = backend_class(request.param).probe()
    if not found.available:
        pytest.skip(f"{request.param}: {found.reason}")
    return str(request.param)


@pytest.fixture
def cuda(request: pytest.FixtureRequest, engines: str) -> None:
    """Leave out of a rehearsal what needs CUDA."""
    if request.config.getoption("--rehearse"):
        pytest.skip("needs CUDA")


@pytest.fixture(scope="session")
def report(request: pytest.FixtureRequest) -> Report:
    """What docs/gpu-report.md is made of."""
    return request.config.stash[REPORT]


@pytest.fixture(scope="session")
def build(engines: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Bundle]:
    """Return a function that builds a bundle for `engines`, once for equal options.

    A process of its own builds each: one process can't compile with both TensorRT packages.
    """
    made: dict[tuple[Path, tuple[str, ...]], Bundle] = {}

    def make(model: Path, *options: str) -> Bundle:
        if (model, options) not in made:
            out = tmp_path_factory.mktemp("bundle") / "bundle"
            command = [
                sys.executable,
                str(ROOT / "cli.py"),
                "build",
                str(model),
                "--out",
                str(out),
                "--backend",
                engines,
                *_target(engines),
                *options,
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            made[model, options] = Bundle(out)
        return made[model, options]

    return make


DEMO_POLICIES = ("teacache", "off", "taylorseer", "adacache", "custom")


@pytest.fixture(scope="session")
def demo(build: Callable[..., Bundle], repository: Path) -> Callable[..., Bundle]:
    """Return a function that builds the demo model with its configs."""
    configs = [o for p in DEMO_POLICIES for o in ("--config", f"shapes_wan_{p}")]

    def make(precision: str = "float32", weights: str = "inputs") -> Bundle:
        options = (*configs, "--precision", precision, "--weights", weights)
        return build(repository / "models" / "shapes_wan", *options)

    return make


def _target(engines: str) -> list[str]:
    if engines != "tensorrt-rtx":
        return []
    major, minor = torch.cuda.get_device_capability()
    return ["--compute-capability", f"{major}.{minor}"]
