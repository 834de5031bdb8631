# SPDX-License-Identifier: Apache-2.0
"""Bundles from someone else: cut, flipped, linked elsewhere, for another backend. Never a crash.

Every case is opened and looked at as `run` and `verify` do. What a reader promises: an error of the
project, or the very bytes that the manifest describes.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch

from freewheel.bundle.reader import MANIFEST, Bundle, parse_manifest
from freewheel.core.errors import BundleError, FreewheelError
from freewheel.runtime.model import Model
from freewheel.runtime.session import Session

NIGHTLY = pytest.mark.nightly


@pytest.fixture
def folder(tiny_bundle: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle.folder, tmp_path / "copy"))


def files_of(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


def run_two_steps(folder: Path, backend: str) -> list[torch.Tensor]:
    session = Session(Model(Bundle(folder), backend))
    session.set_prompt("cond", {"text_states": torch.ones(1, 3, 24)})
    session.begin(torch.tensor([900.0, 100.0]))
    latents = {"latents": torch.ones(1, 4, 1, 4, 4)}
    return [session.step("cond", step, latents).clone() for step in range(2)]


def flipped(content: bytes, rng: random.Random) -> bytes:
    found = bytearray(content)
    found[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(found)


@pytest.mark.parametrize("flips", [200, pytest.param(6000, marks=NIGHTLY)])
def test_flipped_bytes_in_every_file_are_named_by_their_digest(folder: Path, flips: int) -> None:
    rng = random.Random(0)
    paths = [p for p in files_of(folder) if p.name != MANIFEST]
    each = flips // len(paths) + 1
    bundle = Bundle(folder)
    cases = 0
    for path in paths:
        content, name = path.read_bytes(), path.relative_to(folder).as_posix()
        for _ in range(each):
            path.write_bytes(flipped(content, rng))
            assert bundle.damaged(name, 1 << 30) == [name]
            cases += 1
        assert bundle.digests() == [name], "and no other"
        path.write_bytes(content)
    assert bundle.digests() == []
    assert cases >= flips


@pytest.mark.parametrize("flips", [100, pytest.param(2000, marks=NIGHTLY)])
def test_flipped_bytes_of_the_manifest_are_refused_or_read(folder: Path, flips: int) -> None:
    rng = random.Random(1)
    content = (folder / MANIFEST).read_bytes()
    outcomes = set()
    for _ in range(flips):
        (folder / MANIFEST).write_bytes(flipped(content, rng))
        try:
            Bundle(folder).digests()
            outcomes.add("read")
        except BundleError as error:
            outcomes.add("refused" if error.where and error.what else "unexplained")
    assert "refused" in outcomes
    assert "unexplained" not in outcomes


def test_flipped_engines_are_refused_before_a_runtime_sees_them(folder: Path) -> None:
    rng = random.Random(2)
    for path in files_of(folder / "engines"):
        content = path.read_bytes()
        path.write_bytes(flipped(content, rng))
        backend = path.parts[-3].partition("-")[0]
        with pytest.raises(BundleError) as caught:
            Model(Bundle(folder), backend).engine(path.parent.name)
        assert path.parent.name in caught.value.where
        path.write_bytes(content)


def test_a_manifest_cut_at_any_byte_is_refused(repository: Path) -> None:
    content = (repository / "tests/fuzz/corpus/manifest/whole").read_bytes()
    assert parse_manifest(content, MANIFEST).family == "wan"
    for end in range(len(content)):
        with pytest.raises(BundleError, match="is not JSON"):
            parse_manifest(content[:end], MANIFEST)


def test_a_file_cut_anywhere_is_refused(folder: Path) -> None:
    for path in files_of(folder):
        whole = path.read_bytes()
        for length in {0, len(whole) // 2, len(whole) - 1}:
            path.write_bytes(whole[:length])
            with pytest.raises(BundleError):
                Bundle(folder)
        path.write_bytes(whole)
    Bundle(folder)


@pytest.mark.parametrize("target", ["/etc/hostname", "../outside", "loop", "x" * 300])
def test_links_that_lead_out_or_nowhere_are_refused(folder: Path, target: str) -> None:
    (folder.parent / "outside").write_bytes(b"secret")
    data = json.loads((folder / MANIFEST).read_text())
    name = "x" * 300 if target.startswith("x") else "loop"
    if name == "loop":
        (folder / name).symlink_to(target)
    data["files"][name] = {"bytes": 6, "sha256": "0" * 64}
    (folder / MANIFEST).write_text(json.dumps(data))
    with pytest.raises(BundleError):
        Bundle(folder)


def test_a_folder_that_links_out_is_refused(folder: Path) -> None:
    (folder / "graphs").rename(folder.parent / "graphs")
    (folder / "graphs").symlink_to(folder.parent / "graphs")
    with pytest.raises(BundleError, match="leaves the bundle's folder"):
        Bundle(folder)


def test_dimensions_that_derive_from_each_other_end(folder: Path) -> None:
    data = json.loads((folder / MANIFEST).read_text())
    data["dims"]["tokens"] = [["tokens_per_frame", 1]]
    data["dims"]["tokens_per_frame"] = [["tokens", 1]]
    (folder / MANIFEST).write_text(json.dumps(data))
    with pytest.raises(FreewheelError):
        run_two_steps(folder, "onnxruntime")


def test_engines_of_another_backend_are_refused(folder: Path) -> None:
    data = json.loads((folder / MANIFEST).read_text())
    for engines in data["engines"]:
        engines["backend"] = {"openvino": "onnxruntime", "onnxruntime": "openvino"}[
            engines["backend"]
        ]
    (folder / MANIFEST).write_text(json.dumps(data))
    for backend in ("openvino", "onnxruntime"):
        with pytest.raises(
            BundleError, match=f"compiled for backend .*, but here it is '{backend}'"
        ):
            run_two_steps(folder, backend)


@pytest.mark.parametrize(
    "damage", ["graph without an engine", "input that nothing gives", "dimension", "no tensor"]
)
def test_a_manifest_that_leads_a_run_astray_is_refused(folder: Path, damage: str) -> None:
    data = json.loads((folder / MANIFEST).read_text())
    if damage == "graph without an engine":
        del data["engines"][0]["files"]["finish"]
    elif damage == "input that nothing gives":
        data["graphs"]["head"]["inputs"]["strange"] = {"dtype": "float32", "shape": []}
    elif damage == "dimension":
        data["graphs"]["head"]["outputs"]["hidden"]["shape"][1] = "nothing"
    else:
        data["graphs"]["block"]["weights"]["attn1.to_q.weight"] = "absent.{block}"
    (folder / MANIFEST).write_text(json.dumps(data))
    with pytest.raises(FreewheelError):
        run_two_steps(folder, data["engines"][0]["backend"])


def test_absurd_sizes_of_latents_are_refused_before_allocation(folder: Path) -> None:
    data = json.loads((folder / MANIFEST).read_text())
    data["graphs"]["head"]["outputs"]["hidden"]["shape"] = [1 << 40, 1 << 40, 32]
    (folder / MANIFEST).write_text(json.dumps(data))
    with pytest.raises(FreewheelError, match="absurdly large"):
        run_two_steps(folder, "onnxruntime")


def test_the_undamaged_copy_runs(folder: Path) -> None:
    for backend in ("openvino", "onnxruntime"):
        assert all(torch.isfinite(t).all() for t in run_two_steps(folder, backend))
