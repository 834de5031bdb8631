# SPDX-License-Identifier: Apache-2.0

import json

import pytest

from freewheel.core.errors import BundleError, OutputError
from freewheel.engines import TensorSpec
from freewheel.engines.record import EngineRecord, engine_folder

RECORD = EngineRecord(
    "openvino",
    "1.2",
    "here",
    "float32",
    {"x": TensorSpec("float32", ("batch", 4))},
    {"y": TensorSpec("int64", ())},
    details={"computed_in": "float32"},
)


@pytest.fixture
def engine(tmp_path):
    with engine_folder(tmp_path / "engine") as folder:
        (folder / "model.bin").write_bytes(b"12345")
        RECORD.write(folder)
    return tmp_path / "engine"


def edit(engine, **changes):
    path = engine / "engine.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_record_reads_back_as_written(engine):
    found = EngineRecord.read(engine)
    assert found.files == {"model.bin": 5}
    assert found.inputs == RECORD.inputs
    assert found.outputs == RECORD.outputs
    assert found.details == RECORD.details


@pytest.mark.parametrize("name", ["../model.bin", "/etc/hostname", "a/../model.bin", ".."])
def test_names_that_leave_the_folder_are_refused(engine, name):
    edit(engine, files={name: 5})
    with pytest.raises(BundleError, match="leaves the engine's folder"):
        EngineRecord.read(engine)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "not a readable engine record"),
        (b"[]", "not a readable engine record"),
        (b'{"schema_version": 1}', "not a readable engine record"),
        (b'{"schema_version": 99}', "schema version is 99"),
        (b"\xff\xfe", "not a readable engine record"),
    ],
)
def test_broken_records_are_refused(engine, content, what):
    (engine / "engine.json").write_bytes(content)
    with pytest.raises(BundleError, match=what):
        EngineRecord.read(engine)


def test_a_missing_engine_and_a_missing_file_are_named(engine, tmp_path):
    with pytest.raises(BundleError, match="nowhere"):
        EngineRecord.read(tmp_path / "nowhere")
    (engine / "model.bin").unlink()
    with pytest.raises(BundleError, match=r"'model\.bin'.*missing"):
        EngineRecord.read(engine)


def test_a_failed_write_leaves_the_old_engine_and_no_partial_one(engine):
    def write_half():
        with engine_folder(engine) as folder:
            (folder / "model.bin").write_bytes(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert (engine / "model.bin").read_bytes() == b"12345"
    assert [p.name for p in engine.parent.iterdir()] == ["engine"]


def test_a_full_disk_is_an_output_error(tmp_path):
    with pytest.raises(OutputError, match="No space left"), engine_folder(tmp_path / "engine"):
        raise OSError(28, "No space left on device")
    assert not any(tmp_path.iterdir())
