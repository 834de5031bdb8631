"""An edit of any file that makes graphs, or another library, is another version."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from freewheel.compiler import code_version as versions

version_of = versions.code_version.__wrapped__


@pytest.fixture
def copy(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The source files in a place of their own."""
    for package in versions.PACKAGES:
        shutil.copytree(repository / package, tmp_path / package)
    monkeypatch.setattr(versions, "ROOT", tmp_path)
    return tmp_path


def test_equal_code_has_one_version(copy: Path) -> None:
    assert version_of() == versions.code_version()


@pytest.mark.parametrize(
    "file",
    [
        "passes/remove_no_op_casts.py",
        "policies/teacache.py",
        "compiler/graphs/export.py",
        "engines/openvino.py",
        "compiler/samplers.py",
        "bundle/manifest.py",
        "core/dtypes.py",
    ],
)
def test_an_edit_is_another_version(copy: Path, file: str) -> None:
    before = version_of()
    with (copy / file).open("a") as stream:
        stream.write("\n")
    assert version_of() != before


def test_another_library_is_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    before = version_of()
    known = versions.version
    monkeypatch.setattr(versions, "version", lambda n: "0" if n == "torch" else known(n))
    assert version_of() != before
