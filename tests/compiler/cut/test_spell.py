# SPDX-License-Identifier: Apache-2.0
"""A row that was learnt is written as the table has its rows."""

from __future__ import annotations

from test_learn import learnt

from freewheel.compiler.cut import row as words
from freewheel.compiler.cut.row import Row
from freewheel.compiler.cut.spell import spelled


def test_a_row_is_spelled_as_the_table_has_it() -> None:
    row, _, _ = learnt("qwen_image")
    names = {"Row": Row, "step": words.step, "run": words.run, "prompt": words.prompt}
    names["size"] = words.size
    assert eval(spelled(row), names) == row
    assert '"img_shapes": [[(1, size("rows"), size("columns"))]],' in spelled(row)
