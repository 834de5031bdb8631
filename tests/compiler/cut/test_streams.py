# SPDX-License-Identifier: Apache-2.0
"""Streams are followed from where they begin to the last block."""

from __future__ import annotations

from dataclasses import replace

import pytest
from cases import Case, case, conditioned
from torch import Tensor, nn

from freewheel.compiler.cut.cut import cut_model
from freewheel.compiler.cut.row import Ignored, Row, prompt, run, step
from freewheel.compiler.cut.streams import find_streams, latents_of
from freewheel.compiler.cut.words import Cut
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
    skipped = replace(
        last,
        inputs=tuple(
            "blocks.0.hidden_states" if name == "blocks.2.hidden_states" else name
            for name in last.inputs
        ),
    )
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


@pytest.mark.nightly
def test_what_is_sampled_beside_the_video_has_a_stream_of_its_own() -> None:
    cut = case("ltx_2").cut
    assert list(latents_of(cut).values()) == ["latents", "audio_latents"]
    streams = find_streams(cut)
    assert sorted(streams.inputs["block"].values()) == ["audio_hidden", "hidden"]
    assert streams.of[cut.calls[-1].inputs[0]] == "hidden"


def two_streams(read: int, **others: object) -> Cut:
    """Cut a model of two latents whose blocks mix them, and whose end reads some of them."""
    row = Row(
        "Two",
        {
            "hidden_states": step("batch tokens 4"),
            "sound_hidden_states": step("batch audio_tokens 4"),
            "timestep": run(),
            "encoder_hidden_states": prompt("batch 4"),
            **others,
        },
    )

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: Tensor, y: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
            x = x + nn.functional.scaled_dot_product_attention(self.a(x), self.b(y), self.c(y))
            return x, y + nn.functional.scaled_dot_product_attention(
                self.a(y), self.b(x), self.c(x * scale)
            )

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block() for _ in range(4)])

        @classmethod
        def from_config(cls, config: object) -> nn.Module:
            return cls()

        def forward(
            self,
            hidden_states: Tensor,
            sound_hidden_states: Tensor,
            timestep: Tensor,
            encoder_hidden_states: Tensor,
            *,
            return_dict: bool,
        ) -> tuple[Tensor, ...]:
            x, y = hidden_states.sin(), sound_hidden_states.sin()
            scale = encoder_hidden_states.tanh().unsqueeze(1)
            for block in self.blocks:
                x, y = block(x, y, scale)
            return (x.cos(), y.cos())[:read]

    return cut_model(row, Two, {})


def test_streams_are_called_after_their_latents() -> None:
    """An argument that changes nothing is no input of the cut."""
    cut = two_streams(2, fps=Ignored())
    assert "fps" not in cut.inputs
    streams = find_streams(cut)
    (inputs, outputs) = (table["block"] for table in (streams.inputs, streams.outputs))
    assert sorted(inputs.values()) == sorted(outputs.values()) == ["hidden", "sound_hidden"]


def test_a_stream_that_nothing_reads_in_the_end_is_refused() -> None:
    with pytest.raises(ExportError, match="reads no more behind its blocks of a stream"):
        find_streams(two_streams(1))
