"""Ten faults put in on purpose, one at a time: what `make test` runs fails for each of them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest


class Mutation(NamedTuple):
    """A text of a source file, what stands there in its place, and the tests that must fail."""

    file: str
    text: str
    instead: str
    tests: str


MUTATIONS = {
    "a sign in reuse": Mutation(
        "compiler/graphs/caching.py", "hidden + torch.matmul(mix", "hidden - torch.matmul(mix",
        "tests/compiler/graphs/test_caching.py",
    ),
    "a stale state": Mutation(
        "runtime/decider.py", "            self._set(name, initial)\n",
        "            self._set(name, initial) if len(schedule) == 1 else None\n",
        "tests/runtime/test_session.py",
    ),
    "a skipped guard": Mutation(
        "policies/guard.py", '            | (index < limits["first_exact"])\n', "",
        "tests/policies/test_guard.py",
    ),
    "a wrong slot": Mutation(
        "runtime/ring.py", "slot = (self._newest - age)", "slot = (self._newest + age)",
        "tests/runtime/test_ring.py",
    ),
    "an unescaped path": Mutation(
        "bundle/files.py", "escapes = escapes or not path", "escapes = escapes and not path",
        "tests/bundle/test_files.py",
    ),
    "a damaged engine": Mutation(
        "runtime/model.py", "            if damaged:\n", "            if damaged and False:\n",
        "tests/bundle/test_hostile.py",
    ),
    "a damaged piece": Mutation(
        "bundle/store.py", "if _digests(place / PIECE) != whole:", "if whole is None:",
        "tests/bundle/test_store.py",
    ),
    "a graph of other code": Mutation(
        "compiler/graphs/write.py", "            code_version(),\n", "",
        "tests/compiler/graphs/test_write.py",
    ),
    "a sampler's factor": Mutation(
        "compiler/samplers.py", "= factors[reach:]", "= factors[:reach]",
        "tests/compiler/test_samplers.py",
    ),
    "a cast that changes something": Mutation(
        "passes/remove_no_op_casts.py", "node.inputs[0].dtype == node.outputs[0].dtype", "True",
        "tests/passes/test_remove_no_op_casts.py",
    ),
    "a distance that is forgotten": Mutation(
        "policies/teacache.py", 'distance = state["distance"] + rescaled', "distance = rescaled",
        "tests/policies/test_teacache.py",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def copy(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository that is imported in place of it."""
    folder = tmp_path_factory.mktemp("mutations")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=True)
    for name in listed.stdout.splitlines():
        if (repository / name).is_file():
            (folder / "freewheel" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(repository / name, folder / "freewheel" / name)
    return folder / "freewheel"


def run_tests(copy: Path, tests: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-B", "-m", "pytest", "-x", "-p", "no:cacheprovider", *tests.split()],
        cwd=copy,
        env={**os.environ, "PYTHONPATH": str(copy.parent)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("name", MUTATIONS)
def test_what_a_fault_changes_stands_once(name: str, repository: Path) -> None:
    whole = (repository / MUTATIONS[name].file).read_text(encoding="utf-8")
    assert whole.count(MUTATIONS[name].text) == 1, "the code has changed: change the mutation"


@pytest.mark.nightly
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_fault_is_found(name: str, copy: Path) -> None:
    mutation = MUTATIONS[name]
    source = copy / mutation.file
    whole = source.read_text(encoding="utf-8")
    source.write_text(whole.replace(mutation.text, mutation.instead), encoding="utf-8")
    try:
        done = run_tests(copy, mutation.tests)
    finally:
        source.write_text(whole, encoding="utf-8")
    assert done.returncode == 1, done.stdout[-3000:]
    assert " failed" in done.stdout


def test_without_a_fault_they_pass(copy: Path) -> None:
    done = run_tests(copy, " ".join(sorted({m.tests for m in MUTATIONS.values()})))
    assert done.returncode == 0, done.stdout[-3000:]
