# SPDX-License-Identifier: Apache-2.0
"""Every token is exactly one rank's, and a manifest says to each which."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from freewheel.bundle.manifest import SequenceEntry
from freewheel.core.errors import RequestError
from freewheel.runtime.distributed.shares import Share, share, side_by_side

ENTRY = SequenceEntry(
    sums={"joint": ["text_tokens", "tokens"]},
    shared={"hidden": ["tokens"], "text": ["text_tokens"], "angles": ["text_tokens", "tokens"]},
    blocks={},
    rows="finish.rows",
    joined=None,
    policies={},
)


@given(count=st.integers(1, 1000), size=st.integers(1, 9))
def test_shares_are_even_and_lie_side_by_side(count: int, size: int) -> None:
    parts = [share(count, rank, size) for rank in range(size)]
    counts = [end - first for first, end in parts]
    assert parts == side_by_side(counts)
    assert sum(counts) == count
    assert max(counts) - min(counts) <= 1
    assert counts == sorted(counts, reverse=True)


def test_a_part_of_a_sequence_is_a_part_of_each_stream() -> None:
    dims = {"text_tokens": 5, "tokens": 7}
    second = Share(1, 2, ENTRY)
    assert second.parts(["text_tokens", "tokens"], dims) == [((3, 5), (0, 2)), ((9, 12), (2, 5))]
    assert second.counts("joint", dims) == [7, 5]
    assert second.local_dims(dims) == {
        "local_tokens": 3,
        "local_text_tokens": 2,
        "local_joint": 5,
    }


def test_a_rank_without_tokens_is_refused_by_name() -> None:
    with pytest.raises(RequestError, match="dimension 'text_tokens': is 3, fewer than 4 ranks"):
        Share(0, 4, ENTRY).local_dims({"text_tokens": 3, "tokens": 40})
