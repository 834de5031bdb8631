"""Where a block loop divides, over declarations alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from freewheel.bundle.manifest import SkipEntry, StageEntry
from freewheel.bundle.sections import beside_cached, count_blocks, divide
from freewheel.core.errors import ConfigError
from freewheel.core.tensor_spec import TensorSpec


def graph(*inputs: str, gives: tuple[str, ...] = ("hidden",), tokens: str = "tokens") -> Any:
    spec = TensorSpec("float32", ("batch", tokens, 8))
    return SimpleNamespace(
        inputs=dict.fromkeys(inputs, spec), outputs={f"{n}_out": spec for n in gives}
    )


ONE = {"block": graph("hidden", "temb")}
TWO = {
    "text_only": graph("text", gives=("text",)),
    "double": graph("hidden", "text", gives=("hidden", "text")),
    "single": graph("hidden", "text", gives=("hidden", "text")),
}


def stages(*pairs: tuple[str, int]) -> list[StageEntry]:
    return [StageEntry(block=name, count=count) for name, count in pairs]


def test_one_stream_divides_at_any_block() -> None:
    found = divide(stages(("block", 8)), ONE, ["hidden"], 2, 3)
    assert (found.begin, found.end, found.blocks, found.streams) == (2, 5, 8, ("hidden",))
    assert found.always_run == 5 / 8
    found = divide(stages(("block", 8)), ONE, ["hidden"], 1, 0)
    assert (found.begin, found.end, found.streams) == (1, 8, ("hidden",))


@pytest.mark.parametrize(("first", "last"), [(3, 0), (2, 1), (1, 2), (1, 9)])
def test_a_block_is_left_between(first: int, last: int) -> None:
    with pytest.raises(ConfigError, match=f"{first} first and {last} last blocks .* the model's 3"):
        divide(stages(("block", 3)), ONE, ["hidden"], first, last)


def test_last_blocks_reach_over_a_stages_end_and_need_the_text_they_read() -> None:
    loop = stages(("text_only", 1), ("double", 2), ("single", 3))
    assert count_blocks(loop, TWO) == 5
    found = divide(loop, TWO, ["hidden"], 1, 0)
    assert (found.begin, found.end, found.streams) == (2, 6, ("hidden",))
    found = divide(loop, TWO, ["hidden"], 1, 1)
    assert (found.begin, found.end, found.streams) == (2, 5, ("hidden", "text"))
    found = divide(loop, TWO, ["hidden"], 1, 3)
    assert (found.begin, found.end, found.streams) == (2, 3, ("hidden", "text"))
    assert set(beside_cached(loop, TWO, ["hidden"])) == {"text"}


def test_a_stream_that_begins_between_can_not_be_read_behind() -> None:
    graphs = {**TWO, "plain": graph("hidden"), "begins": graph("hidden", gives=("hidden", "text"))}
    loop = stages(("plain", 1), ("begins", 2), ("double", 2))
    with pytest.raises(ConfigError, match="stream 'text', which begins among the cached"):
        divide(loop, graphs, ["hidden"], 1, 1)
    assert divide(loop, graphs, ["hidden"], 2, 1).streams == ("hidden", "text")


def test_a_skip_from_between_to_behind_is_refused_and_one_from_the_first_taken() -> None:
    graphs = {"down": graph("hidden"), "up": graph("hidden", "hidden_skip")}
    up = StageEntry(
        block="up", count=2, skips={"hidden_skip": SkipEntry(stream="hidden", blocks=[1, 0])}
    )
    loop = [StageEntry(block="down", count=3), up]
    assert divide(loop, graphs, ["hidden"], 1, 1).end == 4
    assert divide(loop, graphs, ["hidden"], 2, 2).end == 3
    with pytest.raises(ConfigError, match="block 3 of the loop reads what block 1 left"):
        divide(loop, graphs, ["hidden"], 1, 2)
