"""The documentation: its links lead somewhere, and its commands and programs run as written."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from freewheel.cli import app

ROOT = Path(__file__).resolve().parent.parent
DOCS = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
RUN = ["README.md", "docs/tutorial.md", "docs/how-to/use-diffusers.md"]
"""Documents whose commands and programs are run, in this order; the README builds the bundle."""

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(#[^)]*)?\)")
every_document = pytest.mark.parametrize("path", DOCS, ids=lambda p: str(p.relative_to(ROOT)))


def blocks(path: Path) -> Iterator[tuple[str, str]]:
    """Yield language and text of each fenced block."""
    yield from BLOCK.findall(path.read_text(encoding="utf-8"))


def commands(path: Path) -> list[list[str]]:
    """Return the arguments of every whole ``freewheel`` command in fenced blocks."""
    text = "\n".join(t for language, t in blocks(path) if language in ("", "bash", "sh"))
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    # A comment stands apart; the '#' in 'file.json#name' is part of an argument.
    lines = [re.sub(r"\s#.*", "", line) for line in lines if line.startswith("freewheel ")]
    found = [shlex.split(line)[1:] for line in lines]
    return [arguments for arguments in found if "…" not in "".join(arguments)]


def test_the_readers_of_blocks_find_them() -> None:
    assert ["inspect", "out/bundle"] in commands(ROOT / "README.md")
    assert sum(language == "python" for p in DOCS for language, _ in blocks(p)) >= 2
    assert len(LINK.findall((ROOT / "README.md").read_text(encoding="utf-8"))) > 5


@every_document
def test_links_lead_to_files(path: Path) -> None:
    targets = [target for target, _ in LINK.findall(path.read_text(encoding="utf-8"))]
    local = [t for t in targets if not t.startswith(("http://", "https://"))]
    assert [t for t in local if not (path.parent / t).exists()] == []


@every_document
def test_commands_have_the_options_that_are_named(path: Path) -> None:
    known = typer.main.get_command(app).commands  # type: ignore[attr-defined]  # it is a group
    for name, *arguments in commands(path):
        command = known.get(name)
        assert command is not None, f"freewheel {name} is no command"
        # Parses and checks every option; runs nothing.
        command.make_context(name, list(arguments))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like a fresh clone: the demo model and nothing built."""
    folder = tmp_path_factory.mktemp("clone")
    (folder / "models").symlink_to(ROOT / "models")
    (folder / "out").mkdir()
    (folder / "out" / "demo").mkdir()
    (folder / "out" / "demo" / "bundle").symlink_to(folder / "out" / "bundle")
    return folder


@pytest.mark.parametrize("name", RUN)
def test_commands_and_programs_run(
    workplace: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workplace)
    for arguments in commands(ROOT / name):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, f"freewheel {shlex.join(arguments)}\n{result.output}"
    for language, text in blocks(ROOT / name):
        if language == "python" and "pipe = " in text:  # the others are fragments of it
            exec(compile(text, name, "exec"), {})
