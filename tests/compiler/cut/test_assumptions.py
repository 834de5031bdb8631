# SPDX-License-Identifier: Apache-2.0
"""What breaks nothing is no assumption."""

from __future__ import annotations

import sympy
from torch.utils._sympy.functions import FloorDiv, Max, PythonMod

from freewheel.compiler.cut.assumptions import Assumption, _may_fail


def test_an_assumption_counts_if_some_size_breaks_it() -> None:
    frames, height = (sympy.Symbol(n, integer=True, positive=True) for n in ("frames", "height"))

    def asked(condition: sympy.Basic, *, by_model: bool = False) -> bool:
        return _may_fail(Assumption(condition, "model.py:1", by_model=by_model))

    assert asked(sympy.Le(frames, 32))
    assert not asked(sympy.Le(1, frames * height))
    assert asked(sympy.Ne(frames, 1), by_model=True)
    assert not asked(sympy.Ne(frames, 1))
    assert not _may_fail(Assumption(sympy.Le(frames, 32), ""))


def test_which_of_two_strides_is_longer_breaks_nothing() -> None:
    height, width = (sympy.Symbol(n, integer=True, positive=True) for n in ("height", "width"))
    rows, columns = Max(1, FloorDiv(height, 2)), Max(1, FloorDiv(width, 2))
    assert not _may_fail(Assumption(sympy.Lt(columns, rows * columns), "model.py:1"))
    assert not _may_fail(Assumption(sympy.Lt(1, height * width), "model.py:1"))
    assert _may_fail(Assumption(sympy.Lt(columns, rows), "model.py:1", by_model=True))
    assert _may_fail(Assumption(sympy.Lt(columns, 32), "model.py:1"))


def test_a_size_at_which_an_assumption_has_no_value_breaks_nothing() -> None:
    height = sympy.Symbol("height", integer=True, positive=True)
    undefined_below_a_patch = sympy.Le(PythonMod(height, FloorDiv(height, 2)), 10**9)
    assert not _may_fail(Assumption(undefined_below_a_patch, "model.py:1"))
