# SPDX-License-Identifier: Apache-2.0
"""Streams are followed from where they begin to the last block."""

from __future__ import annotations

from dataclasses import replace

import pytest
from cases import Case, case, conditioned

from freewheel.compiler.cut.streams import find_streams
from freewheel.core.errors import ExportError


def test_one_stream_goes_from_head_through_every_block(wan: Case) -> None:
    streams = find_streams(wan.cut)
    assert [call.block for call in streams.blocks] == [f"blocks.{i}" for i in range(4)]
    (place,) = streams.inputs["block"]
    assert streams.inputs["block"] == {place: "hidden"}
    assert streams.outputs["block"] == {0: "hidden"}
    assert streams.of[streams.blocks[0].inputs[place]] == "hidden"
    assert streams.of[streams.blocks[-1].outputs[0]] == "hidden"
    assert streams.first_of_hidden == "block"


def test_text_is_a_stream_beside_it() -> None:
    streams = find_streams(case("flux").cut)
    for template in {call.segment for call in streams.blocks}:
        assert sorted(streams.inputs[template].values()) == ["hidden", "text"]
        assert sorted(streams.outputs[template].values()) == ["hidden", "text"]


def test_what_skips_a_block_is_refused(wan: Case) -> None:
    """The last block reads what the first made, as in networks with skip connections."""
    *others, last, finish = wan.cut.calls
    skipped = replace(last, inputs=tuple(
        "blocks.0.hidden_states" if name == "blocks.2.hidden_states" else name
        for name in last.inputs
    ))  # fmt: skip
    with pytest.raises(ExportError, match=r"equal block before the last made: blocks\.0\.hidden"):
        find_streams(replace(wan.cut, calls=(*others, skipped, finish)))


def test_a_stream_may_begin_before_the_first_block() -> None:
    streams = find_streams(conditioned().cut)
    assert [call.block for call in streams.blocks] == ["", *(f"blocks.{i}" for i in range(4))]
    (scale,) = streams.outputs["condition"].values()
    assert scale != "hidden"
    block = streams.blocks[-1].segment
    assert sorted(streams.inputs[block].values()) == sorted(["hidden", scale])
    assert list(streams.outputs[block].values()) == ["hidden"]


def test_behind_the_blocks_no_other_stream_is_read() -> None:
    """A reused step runs no block: only the latents' stream is known then."""
    cut = conditioned().cut
    *others, finish = cut.calls
    (scale,) = next(c for c in others if c.segment == "condition").outputs
    reading = replace(finish, inputs=(*finish.inputs, scale))
    with pytest.raises(ExportError, match="behind its blocks more than the latents' stream"):
        find_streams(replace(cut, calls=(*others, reading)))
