# SPDX-License-Identifier: Apache-2.0
"""A cut read back is the cut that was written; a document runs nothing but a graph's operators."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import EVERY_RUN, Case, case
from test_declare import DECLARED, declared, error

from freewheel.bundle.reader import Bundle
from freewheel.compiler.cut.document import CONSTANTS, DOCUMENT, FILES, cut_of, read_cut, write_cut
from freewheel.compiler.cut.row import SIZES
from freewheel.compiler.graphs.write import io_entries
from freewheel.core.errors import BundleError

ANSWER = "print(6 * 7)"


@pytest.mark.parametrize("name", DECLARED)
def test_what_is_read_back_is_the_transformer(name: str, tmp_path: Path) -> None:
    one = case(name)
    cut = declared(one, "bfloat16")
    write_cut(cut, tmp_path / "cut")
    read = read_cut(tmp_path / "cut")
    assert error(one, read, SIZES) == error(one, cut, SIZES)
    for found, wanted in zip(read.segments, cut.segments, strict=True):
        own = {n: v for n, v in vars(wanted).items() if n != "module"}
        assert {n: v for n, v in vars(found).items() if n != "module"} == own
        assert [n.name for n in found.module.graph.nodes] == [  # type: ignore[union-attr, operator]
            n.name
            for n in wanted.module.graph.nodes  # type: ignore[union-attr, operator]
        ]
        assert found.module.state_dict().keys() == wanted.module.state_dict().keys()
    rest = [n for n in vars(cut) if n != "segments"]
    assert {n: getattr(read, n) for n in rest} == {n: getattr(cut, n) for n in rest}


def test_segments_of_one_module_share_it_still(tmp_path: Path) -> None:
    write_cut(declared(case(EVERY_RUN[0])), tmp_path / "cut")
    modules = {s.name: s.module for s in read_cut(tmp_path / "cut").segments}
    assert modules["block"] is modules["block_tapped"]


def test_a_process_that_cut_nothing_reads_it(tmp_path: Path, wan: Case) -> None:
    """Operators that graphs call are known without what exports them."""
    write_cut(declared(wan), tmp_path / "cut")
    assert "onnx.RotaryEmbedding" in (tmp_path / "cut" / DOCUMENT).read_text()
    program = (
        "import sys; from pathlib import Path; from freewheel.compiler.cut.document import read_cut\n"
        "read_cut(Path(sys.argv[1]))"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "cut")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def edited(tmp_path: Path, wan: Case) -> Callable[[Callable[[dict[str, Any]], None]], Path]:
    """Return a function that writes a cut whose document was changed."""

    def edit(change: Callable[[dict[str, Any]], None]) -> Path:
        write_cut(declared(wan), tmp_path / "cut")
        place = tmp_path / "cut" / DOCUMENT
        document = json.loads(place.read_text())
        change(document)
        place.write_text(json.dumps(document))
        return tmp_path / "cut"

    return edit


def first(document: dict[str, Any], op: str) -> dict[str, Any]:
    return next(n for g in document["graphs"] for n in g["nodes"] if n["op"] == op)


@pytest.mark.parametrize(
    ("op", "key", "value"),
    [
        ("placeholder", "target", f"x): {ANSWER}\n#"),
        ("placeholder", "target", "a.b"),
        ("placeholder", "target", "class"),
        ("call_function", "name", f"x = {ANSWER};"),
        ("call_function", "kwargs", {f"x={ANSWER}": 1}),
        ("call_function", "target", "os.system"),
        ("call_function", "target", "aten.from_file.default"),
        ("call_function", "target", "aten.add_.Tensor"),
        ("call_function", "target", "aten.add.out"),
        ("call_function", "target", "aten.add.no_such_overload"),
        ("call_function", "target", "prims.add.default"),
        ("call_function", "args", [{"node": "nobody"}]),
        ("call_function", "args", [{"dtype": "load"}]),
        ("call_function", "args", [{"module": "os"}]),
        ("call_function", "args", [{"float": "1", "node": "x"}]),
        ("get_attr", "target", "forward"),
        ("get_attr", "target", f'x"); {ANSWER} #'),
        ("placeholder", "op", "call_module"),
    ],
)
def test_a_document_calls_nothing_else(
    edited: Any, capsys: pytest.CaptureFixture[str], op: str, key: str, value: Any
) -> None:
    folder = edited(lambda document: first(document, op).__setitem__(key, value))
    with pytest.raises(BundleError, match="holds no cut"):
        read_cut(folder)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("args", [[9, 10**9], [9, {"float": "inf"}], [9, [2]], [9]])
def test_a_power_that_may_fill_the_memory_is_refused(edited: Any, args: list[Any]) -> None:
    folder = edited(
        lambda document: first(document, "call_function").update({"target": "pow", "args": args})
    )
    with pytest.raises(BundleError, match="holds no cut"):
        read_cut(folder)


@pytest.mark.parametrize("key", ["graphs", "stages", "dims", "unread"])
def test_a_document_without_a_part_is_refused(edited: Any, key: str) -> None:
    folder = edited(lambda document: document.pop(key))
    with pytest.raises(BundleError, match="holds no cut"):
        read_cut(folder)


@pytest.mark.parametrize("name", [DOCUMENT, CONSTANTS])
def test_a_file_that_is_cut_off_or_missing_is_refused(name: str, tmp_path: Path, wan: Case) -> None:
    write_cut(declared(wan), tmp_path / "cut")
    place = tmp_path / "cut" / name
    place.write_bytes(place.read_bytes()[:-20])
    with pytest.raises(BundleError, match="holds no cut"):
        read_cut(tmp_path / "cut")
    place.unlink()
    with pytest.raises(BundleError, match="holds no cut"):
        read_cut(tmp_path / "cut")


def test_numbers_that_json_lacks_come_back(tmp_path: Path, wan: Case) -> None:
    cut = declared(wan)
    module: Any = cut.segments[0].module
    node = next(n for n in module.graph.nodes if n.op == "call_function")
    node.kwargs = {"limit": float("-inf"), "dtype": torch.bfloat16, "device": torch.device("meta")}
    write_cut(cut, tmp_path / "cut")
    read: Any = read_cut(tmp_path / "cut").segments[0].module
    found = next(n for n in read.graph.nodes if n.name == node.name)
    assert dict(found.kwargs) == dict(node.kwargs)


def test_a_bundle_has_the_cut_that_its_manifest_declares(tiny_bundle: Bundle) -> None:
    manifest, cut = tiny_bundle.manifest, cut_of(tiny_bundle)
    assert cut.history_dtype == manifest.history_dtype
    assert [s.count for s in cut.stages] == [s.count for s in manifest.stages]
    for segment in cut.segments:
        kept = {n: s for n, s in segment.outputs.items() if n not in segment.dropped}
        assert io_entries(kept) == manifest.graphs[segment.name].outputs
    assert all(p.device.type == "meta" for s in cut.segments for p in s.module.parameters())


def test_a_cut_that_the_manifest_does_not_list_is_not_read(
    tiny_bundle: Bundle, tmp_path: Path
) -> None:
    """Such a file was not checked: it may be a link to anywhere."""
    shutil.copytree(tiny_bundle.folder, tmp_path / "copy")
    manifest = json.loads((tmp_path / "copy" / "manifest.json").read_text())
    for name in FILES:
        del manifest["files"][name]
    (tmp_path / "copy" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="lists no cut"):
        cut_of(Bundle(tmp_path / "copy"))
