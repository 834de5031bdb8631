# SPDX-License-Identifier: Apache-2.0
"""The runner holds passes to what they declare."""

from __future__ import annotations

from typing import ClassVar

import pytest

from freewheel.core.errors import PassError
from freewheel.passes import OptimizeGraph, Pass, PassResult, RemoveNoOpCasts, run_passes

NEGATE = "g (float[n] x) => (float[n] y) { y = Neg(x) }"


class Renaming(Pass):
    """Name the graph; requires that it has a name, ensures the new one."""

    def __init__(self, name: str, kept: str = "") -> None:
        self.name, self.kept = name, kept or name

    def requires(self, model) -> None:
        if model.graph.name is None:
            raise PassError("graph", "has no name")

    def run(self, model) -> PassResult:
        changed = model.graph.name != self.kept
        model.graph.name = self.kept
        return PassResult(model, changed)

    def ensures(self, model) -> None:
        if model.graph.name != self.name:
            raise PassError("graph", f"is called '{model.graph.name}'")


class Copying(Pass):
    in_place: ClassVar[bool] = False

    def run(self, model) -> PassResult:
        return PassResult(model.clone(), changed=False)


class CopyingInSecret(Copying):
    in_place: ClassVar[bool] = True


class EditingInSecret(Renaming):
    in_place: ClassVar[bool] = False


def test_passes_run_in_order_and_those_that_changed_are_named(parse) -> None:
    model, changed = run_passes(parse(NEGATE), [Renaming("a"), Renaming("b"), Renaming("b")])
    assert model.graph.name == "b"
    assert changed == ["Renaming", "Renaming"]


def test_a_functional_pass_returns_another_model(parse) -> None:
    model = parse(NEGATE)
    result, changed = run_passes(model, [Copying()])
    assert result is not model
    assert changed == []


@pytest.mark.parametrize("liar", [CopyingInSecret(), EditingInSecret("a")])
def test_a_pass_that_lies_about_working_in_place_is_refused(parse, liar) -> None:
    with pytest.raises(PassError) as caught:
        run_passes(parse(NEGATE), [liar])
    assert caught.value.where == f"pass '{type(liar).__name__}'"
    assert f"in_place={liar.in_place}" in caught.value.what


def test_a_broken_promise_stops_the_pipeline(parse) -> None:
    model = parse(NEGATE)
    with pytest.raises(PassError, match="is called 'wrong'"):
        run_passes(model, [Renaming("right", kept="wrong"), Renaming("never")])
    assert model.graph.name == "wrong"


def test_a_requirement_is_checked_before_the_pass_runs(parse) -> None:
    model = parse(NEGATE)
    model.graph.name = None
    with pytest.raises(PassError, match="has no name"):
        run_passes(model, [Renaming("a")])
    assert model.graph.name is None


def test_dumps_show_the_graph_after_each_pass(parse, tmp_path) -> None:
    model = parse(
        "g (float[n] x) => (float[n] y) <float[n] a>{ a = Cast<to = 1>(x)  y = Neg(a)  z = Abs(x) }"
    )
    folder = tmp_path / "dump" / "graph"
    run_passes(model, [OptimizeGraph(), RemoveNoOpCasts()], dump=folder)
    texts = {p.name: p.read_text() for p in folder.iterdir()}
    assert sorted(texts) == ["00_OptimizeGraph.txt", "01_RemoveNoOpCasts.txt"]
    assert "Abs" not in texts["00_OptimizeGraph.txt"]
    assert "Neg" in texts["01_RemoveNoOpCasts.txt"]


def test_a_pass_without_run_says_so(parse) -> None:
    with pytest.raises(NotImplementedError):
        run_passes(parse(NEGATE), [Pass()])
