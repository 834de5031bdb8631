"""What fuzzing found worth keeping is replayed: a reader reads it, or refuses it with a message."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from readers import READERS, outcome

CORPUS = Path(__file__).parent / "corpus"
SEEDS = [(name, path) for name in READERS for path in sorted((CORPUS / name).iterdir())]


def test_every_reader_has_a_corpus() -> None:
    assert all(sum(name == reader for name, _ in SEEDS) >= 5 for reader in READERS)


@pytest.mark.parametrize(("name", "path"), SEEDS, ids=lambda v: getattr(v, "name", v))
def test_what_was_found_is_read_or_refused(name: str, path: Path) -> None:
    assert outcome(name, path.read_bytes())


@pytest.mark.parametrize("name", READERS)
def test_whole_files_are_read_and_their_halves_refused(name: str) -> None:
    wholes = {
        "manifest": "whole",
        "config": "shapes_wan_teacache",
        "safetensors": "two_tensors",
        "engine_record": "no_files",
        "trace": "whole",
    }
    content = (CORPUS / name / wholes[name]).read_bytes()
    assert outcome(name, content) == "read"
    assert outcome(name, content[: len(content) // 2]) != "read"


@pytest.mark.parametrize("cases", [200, pytest.param(4000, marks=pytest.mark.nightly)])
def test_damage_anywhere_is_read_or_refused(cases: int) -> None:
    """Bytes replaced, cut out and put in, in a file of any kind."""

    @given(draw=st.data())
    @settings(max_examples=cases)
    def check(draw: st.DataObject) -> None:
        name, path = draw.draw(st.sampled_from(SEEDS))
        content = path.read_bytes()
        at = draw.draw(st.integers(0, len(content)))
        cut = draw.draw(st.integers(0, 8))
        put = draw.draw(st.binary(max_size=8))
        assert outcome(name, content[:at] + put + content[at + cut :])

    check()
