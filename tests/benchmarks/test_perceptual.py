# SPDX-License-Identifier: Apache-2.0
"""LPIPS is the package's own; its network's weights are random here, since they can't be had without a network."""

from __future__ import annotations

import importlib
import subprocess
import sys
import types
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from numpy.typing import NDArray
from perceptual import Lpips, _alexnet_features

PACKAGE = "lpips==0.1.4"


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package lpips, without the packages that it would bring."""
    folder = tmp_path_factory.mktemp("lpips")
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--disable-pip-version-check",
         "--target", str(folder), PACKAGE],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        pytest.skip(f"{PACKAGE} can't be installed: {done.stderr.strip().splitlines()[-1]}")
    return folder


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "alexnet.pth"
    torch.save({f"features.{n}": w for n, w in _alexnet_features().state_dict().items()}, path)
    return path


def _frames(seed: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (3, 96, 96, 3), dtype=np.uint8)


def test_it_is_the_packages_distance(
    package: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = _alexnet_features()
    features.load_state_dict({n[9:]: w for n, w in torch.load(weights).items()})
    torchvision: Any = types.ModuleType("torchvision")
    torchvision.models = types.SimpleNamespace(
        alexnet=lambda pretrained: types.SimpleNamespace(features=features)
    )
    monkeypatch.setitem(sys.modules, "torchvision", torchvision)
    monkeypatch.syspath_prepend(package)
    monkeypatch.setattr(torch, "load", partial(torch.load, map_location="cpu"))
    theirs: Any = importlib.import_module("lpips").LPIPS(net="alex", verbose=False)
    for name in [n for n in sys.modules if n.split(".")[0] == "lpips"]:
        del sys.modules[name]
    ours = Lpips(weights)
    a, b = _frames(0), _frames(1)
    signed = [torch.from_numpy(f).permute(0, 3, 1, 2).float() / 127.5 - 1 for f in (a, b)]
    assert ours(a, b) == pytest.approx(float(theirs(*signed).mean()), rel=1e-5)
    assert ours(a, b) > 0.01
    assert ours(a, a) == 0


def test_another_file_is_refused(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(package)
    other = tmp_path / "other.pth"
    torch.save({"weight": torch.zeros(1)}, other)
    with pytest.raises(typer.BadParameter, match="does not hold AlexNet"):
        Lpips(other)


def test_without_the_package_it_is_named(weights: Path) -> None:
    if find_spec("lpips") is not None:
        pytest.skip("lpips is installed here")
    with pytest.raises(typer.BadParameter, match="needs the package lpips"):
        Lpips(weights)
