"""Markdown tables of results."""

from __future__ import annotations

from freewheel.tuning.table import markdown_table, spread_cell


def test_a_table_in_markdown() -> None:
    rows = [["teacache", 0.12345, 1.5, 3], ["off", None, 12.0, "x"]]
    assert markdown_table(("name", "a", "b", "c"), rows).splitlines() == [
        "| name | a | b | c |",
        "|---|--:|--:|--:|",
        "| teacache | 0.1235 | 1.50 | 3 |",
        "| off | – | 12.00 | x |",
    ]


def test_columns_of_words_align_left() -> None:
    table = markdown_table(("engines", "policy", "seconds"), [["a", "b", 2.0]], texts=2)
    assert table.splitlines()[1] == "|---|---|--:|"


def test_a_spread_is_one_cell() -> None:
    assert spread_cell([1.2, 1.5678]) == "1.20–1.57"
    assert spread_cell(None) is None
