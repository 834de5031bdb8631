"""The documentation: its links lead somewhere, and its commands and programs run as written."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

import freewheel
from freewheel.cli import app
from freewheel.core import errors

ROOT = Path(__file__).resolve().parent.parent
TOP = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")]
DOCS = sorted([*TOP, *(ROOT / "docs").rglob("*.md")])
RUN = ["README.md", "docs/tutorial.md", "docs/how-to/use-diffusers.md"]
"""Documents whose commands and programs are run, in this order; the README builds the bundle."""

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LOST_LIST = re.compile(r"<p>(?:(?!</p>).)*?\n(?:\d\.|-) ", re.DOTALL)
"""In a built page: a list that its paragraph has swallowed, for want of a blank line above it."""
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


def test_every_page_is_reached_from_the_readme() -> None:
    reached, ahead = set(), [ROOT / "README.md"]
    while ahead:
        page = ahead.pop()
        reached.add(page)
        targets = (page.parent / t for t, _ in LINK.findall(page.read_text(encoding="utf-8")))
        ahead += {t.resolve() for t in targets if t.suffix == ".md" and t.exists()} - reached
    assert [str(p.relative_to(ROOT)) for p in DOCS if p not in reached] == []


@every_document
def test_rows_of_a_table_stand_below_its_head(path: Path) -> None:
    lines = ["", *BLOCK.sub("", path.read_text(encoding="utf-8")).splitlines(), ""]
    stranded = []
    for above, line, below in zip(lines, lines[1:], lines[2:], strict=False):
        is_head = re.fullmatch(r"\|[-:| ]+\|", below) is not None
        if line.startswith("|") and not above.startswith("|") and not is_head:
            stranded.append(line)
    assert stranded == []


@every_document
def test_commands_have_the_options_that_are_named(path: Path) -> None:
    known = typer.main.get_command(app).commands  # type: ignore[attr-defined]  # it is a group
    for name, *arguments in commands(path):
        command = known.get(name)
        assert command is not None, f"freewheel {name} is no command"
        # Parses and checks every option; runs nothing.
        command.make_context(name, list(arguments))


def test_benchmarks_that_are_named_are_there_with_their_options() -> None:
    wrong, named = [], 0
    for path in DOCS:
        text = re.sub(r"\\\n\s*", " ", path.read_text(encoding="utf-8"))
        for name, arguments in re.findall(r"python benchmarks/(\w+)\.py([^`\n]*)", text):
            named += 1
            script = ROOT / "benchmarks" / f"{name}.py"
            known = benchmark_options(script) if script.is_file() else set()
            options = set(re.findall(r"(?<=\s)--[a-z][\w-]*", arguments))
            if not script.is_file() or not options <= known:
                wrong.append(f"{path.relative_to(ROOT)}: {name}{arguments}")
    assert wrong == []
    assert named > 10


def benchmark_options(script: Path) -> set[str]:
    """Return the options of a benchmark's `main`, read from its source: it need not import here."""
    tree = ast.parse(script.read_text(encoding="utf-8"))
    (main,) = (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "main")
    names = {a.arg.replace("_", "-") for a in (*main.args.args, *main.args.kwonlyargs)}
    texts = {n.value for n in ast.walk(main) if isinstance(n, ast.Constant)}
    own = {t for t in texts if isinstance(t, str) and t.startswith("--")}
    return {f"--{n}" for n in names} | {f"--no-{n}" for n in names} | own


def test_the_table_of_commands_has_every_verb_and_their_options() -> None:
    known = typer.main.get_command(app).commands  # type: ignore[attr-defined]  # it is a group
    page = (ROOT / "docs" / "reference" / "cli.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)([^`]*)` \|(.*)\|$", page, re.MULTILINE)
    rows = [row for row in rows if row[0].islower()]  # the others are environment variables
    assert sorted(verb for verb, _, _ in rows) == sorted(known)
    for verb, head, text in rows:
        options = {o for parameter in known[verb].params for o in parameter.opts}
        named = set(re.findall(r"--[a-z][\w-]*", head + text))
        assert named <= options, f"{verb}: {sorted(named - options)}"


def test_the_page_of_errors_has_every_class_with_code_exit_code_and_remedy() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    row = r"^\| `(\w+)` \| `(\w+)` \| (\d+) \| ([^|]{20,}) \| ([^|]{10,}) \|$"
    listed = {(name, code, int(number)) for name, code, number, *_ in re.findall(row, page, re.M)}
    classes = [getattr(errors, name) for name in errors.__all__]
    expected = {
        (found.__name__, found.code, found.exit_code)
        for found in classes
        if isinstance(found, type) and found is not errors.FreewheelError
    }
    assert listed == expected


def test_the_site_lists_every_page() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = re.findall(r": ([\w/.-]+\.md)$", text, re.MULTILINE)
    pages = [str(p.relative_to(ROOT / "docs")) for p in (ROOT / "docs").rglob("*.md")]
    assert sorted(listed) == sorted(pages)


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    absent = [n for n in ("mkdocs", "material", "mkdocstrings") if find_spec(n) is None]
    if absent:
        pytest.skip(f"not installed: {', '.join(absent)}, of the extra 'docs'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "troubleshooting" / "index.html").is_file()
    for page in tmp_path.rglob("index.html"):
        assert LOST_LIST.findall(page.read_text(encoding="utf-8")) == [], page
    python = (tmp_path / "reference" / "python" / "index.html").read_text(encoding="utf-8")
    made = set(re.findall(r'id="freewheel\.[\w.]*\.(\w+)"', python))
    assert {n for n in freewheel.__all__ if not n.startswith("_")} <= made
    classes = {n for n in errors.__all__ if isinstance(getattr(errors, n), type)}
    assert {"Generator", "PolicySpec", *classes} <= made


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, build_cache: Path) -> Path:
    """A folder that looks like a fresh clone, but for the graphs that other tests have traced."""
    folder = tmp_path_factory.mktemp("clone")
    (folder / "models").symlink_to(ROOT / "models")
    (folder / "out").mkdir()
    build_cache.mkdir(exist_ok=True)
    (folder / "out" / "freewheel-cache").symlink_to(build_cache)
    (folder / "out" / "demo").mkdir()
    (folder / "out" / "demo" / "bundle").symlink_to(folder / "out" / "bundle")
    return folder


def test_commands_and_programs_run(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one test, since the README builds the bundle that the others use."""
    monkeypatch.chdir(workplace)
    for name in RUN:
        for arguments in commands(ROOT / name):
            result = CliRunner().invoke(app, arguments)
            assert result.exit_code == 0, f"freewheel {shlex.join(arguments)}\n{result.output}"
        for language, text in blocks(ROOT / name):
            if language == "python" and "pipe = " in text:  # the others are fragments of it
                exec(compile(text, name, "exec"), {})


Command = Callable[..., subprocess.CompletedProcess[str]]

SOURCES = ("bundle", "compiler", "configs", "engines", "passes", "policies", "runtime", "tuning")


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package to follow a page in, with a trace as `run --record` writes them."""
    folder = tmp_path_factory.mktemp("copy") / "freewheel"
    for name in (*SOURCES, "tests/policies"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (*ROOT.glob("*.py"), ROOT / "pyproject.toml"):
        shutil.copy(path, folder)
    rng = np.random.default_rng(0)
    arrays = {
        "timesteps": np.linspace(1000, 20, 12, dtype=np.float32),
        "branches": np.array(["cond"]),
        "cond/temb": rng.standard_normal((12, 8)).astype(np.float32),
        "cond/residual": rng.standard_normal((12, 5, 3)).astype(np.float32),
    }
    np.savez(folder / "trace.npz", **arrays)
    return folder


@pytest.fixture(scope="module")
def in_copy(copied: Path) -> Command:
    """Return a function that runs a Python module in the copy."""
    environment = {**os.environ, "PYTHONPATH": str(copied.parent), "PYTHONDONTWRITEBYTECODE": "1"}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", *arguments],
            cwd=copied,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def test_a_policy_is_added_by_following_its_page_to_the_letter(
    copied: Path, in_copy: Command
) -> None:
    page = ROOT / "docs" / "how-to" / "add-a-policy.md"
    shown: dict[str, list[str]] = {}
    for language, text in blocks(page):
        shown.setdefault(language, []).append(text)
    files = [text.partition("\n") for text in shown["python"] if text.startswith("# ")]
    for head, _, text in files:
        (copied / head.removeprefix("# ")).write_text(text, encoding="utf-8")
    assert [head for head, _, _ in files] == ["# policies/pace.py", "# tests/policies/test_pace.py"]
    (row,) = (text for text in shown["python"] if not text.startswith("# "))
    table = copied / "policies" / "__init__.py"
    before = table.read_text(encoding="utf-8")
    last = '    "solved": "solved:Solved",\n'
    assert before.count(last) == 1
    table.write_text(before.replace(last, last + row), encoding="utf-8")
    config = json.loads(shown["json"][0])
    (copied / "pace.json").write_text(shown["json"][0], encoding="utf-8")

    (replay,) = commands(page)
    told = in_copy("freewheel.cli", *replay)
    assert told.returncode == 0, told.stderr
    # 4 dense steps of 12, then every second: steps 4, 6, 8 and 10.
    assert "pace: 8 of 12 steps computed" in told.stdout
    told = in_copy("freewheel.cli", "replay", "trace.npz", "--config", "pace.json")
    assert told.returncode == 0, told.stderr
    assert config == {"feature_caching": "pace", "infer_steps": 30, "dense": 6, "every": 2}
    assert "pace: 9 of 12 steps computed" in told.stdout
    (tested,) = [t for t in shown[""] if t.startswith("pytest ")]
    told = in_copy(*shlex.split(tested), "-q", "-p", "no:cacheprovider")
    assert told.returncode == 0, told.stdout + told.stderr
    assert told.stdout.startswith("... "), "three cases ran"

    # A fault in it is one error, and no other policy's.
    law = copied / "policies" / "pace.py"
    law.write_text(law.read_text(encoding="utf-8").replace("default=4", "default=0"), "utf-8")
    told = in_copy("freewheel.cli", "replay", "trace.npz", "--config", "pace")
    assert told.returncode == 3
    assert "Traceback" not in told.stderr
    text = " ".join(told.stderr.split())
    assert "policy 'pace', policies/pace.py: default of parameter 'dense' 0 is outside" in text
    told = in_copy("freewheel.cli", "replay", "trace.npz", "--config", "taylorseer")
    assert told.returncode == 0, told.stderr
