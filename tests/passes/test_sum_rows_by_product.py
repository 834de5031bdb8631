# SPDX-License-Identifier: Apache-2.0
"""A product with ones and zeros adds the rows that a scatter adds."""

from __future__ import annotations

import numpy as np
import pytest

from freewheel.passes import SumRowsByProduct

ADDED = """
g (float[nCOLUMNS] data, int64[m, 1] places, float[mCOLUMNS] rows) => (float[nCOLUMNS] y) {
    y = ScatterND<reduction = "add">(data, places, rows)
}
"""


@pytest.mark.parametrize("columns", [(), (3,)])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (5, 9)])
def test_it_adds_what_the_scatter_adds(parse, rewrite, evaluate, columns, n: int, m: int) -> None:
    """Rows of one place several times, of another never."""
    random = np.random.default_rng(m)
    feeds = {
        "data": random.standard_normal((n, *columns)).astype(np.float32),
        "places": random.integers(0, n, (m, 1)),
        "rows": random.standard_normal((m, *columns)).astype(np.float32),
    }
    model = parse(ADDED.replace("COLUMNS", "".join(f", {c}" for c in columns)))
    assert rewrite(model, SumRowsByProduct())
    assert "ScatterND" not in {node.op_type for node in model.graph}
    expected = feeds["data"].copy()
    np.add.at(expected, feeds["places"][:, 0], feeds["rows"])
    np.testing.assert_allclose(evaluate(model, feeds)["y"], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "text",
    [
        ADDED.replace("COLUMNS", ", 3").replace("add", "none"),
        ADDED.replace("mCOLUMNS", "m").replace("nCOLUMNS", "n, 3").replace("m, 1", "m, 2"),
        ADDED.replace("COLUMNS", ", 3").replace("add", "max"),
    ],
    ids=["rows are replaced", "an index of two", "the largest is kept"],
)
def test_other_scatters_stay(parse, rewrite, text: str) -> None:
    assert not rewrite(parse(text), SumRowsByProduct())
