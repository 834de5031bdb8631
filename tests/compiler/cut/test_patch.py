# SPDX-License-Identifier: Apache-2.0
"""Patches: put in for the time of a trace, and refused where diffusers has changed the lines."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch
from cases import case
from torch import Tensor, nn

from freewheel.compiler.cut.models import MODELS
from freewheel.compiler.cut.patch import Patch, digest_of, patched
from freewheel.compiler.cut.prove import chain, eager, random_inputs, relative_error
from freewheel.compiler.cut.row import Row, run, step
from freewheel.compiler.cut.trace import trace
from freewheel.core.errors import ExportError

BRANCH = [
    "if x.sum() > 0:",
    "x = x * 2",
    "x = x + 1",
]


class Branching(nn.Module):
    """Takes a branch on a value, which can't be traced."""

    @classmethod
    def from_config(cls, config: Any) -> Branching:
        return cls()

    def forward(self, x: Tensor, t: Tensor, *, return_dict: bool) -> Tensor:
        x = x + t[:, None, None]
        if x.sum() > 0:
            x = x * 2
            x = x + 1
        return x - 1


PATCH = Patch(
    "Branching.forward",
    first="if x.sum() > 0:",
    until="return x",
    digest=digest_of(BRANCH),
    lines="x = torch.where(x.sum() > 0, x * 2 + 1, x)",
)
ROW = Row("Branching", {"x": step("batch tokens 4"), "t": run()}, patches=(PATCH,))


def test_what_cannot_be_traced_is_traced_with_its_patch() -> None:
    with pytest.raises(ExportError, match="can't trace"):
        trace(replace(ROW, patches=()), Branching, {})
    targets = {str(node.target) for node in trace(ROW, Branching, {}).graph.nodes}
    assert "aten.where.self" in targets


def test_a_patch_ends_with_its_context() -> None:
    before = Branching.forward
    with pytest.raises(ExportError), patched(Branching, [PATCH]):
        trace(replace(ROW, inputs={"x": step("batch 4 4 4")}, patches=()), Branching, {})
    assert Branching.forward is before


def test_lines_behind_a_patch_keep_their_numbers() -> None:
    with patched(Branching, [PATCH]):
        code = Branching.forward.__code__
    assert code.co_filename == __file__
    first, last = Branching.forward.__code__.co_firstlineno, list(code.co_lines())[-1][2]
    assert last is not None
    assert last - first == len(BRANCH) + 2


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"digest": "0" * 12}, "has other lines"),
        ({"first": "if x.sum() < 0:"}, "has no such lines"),
        ({"until": "return y"}, "has no such lines"),
        ({"method": "Branching.backward"}, "is not there"),
        ({"method": "Removed.forward"}, "is not there"),
    ],
)
def test_lines_that_diffusers_changed_are_refused(change: dict[str, str], reason: str) -> None:
    with (
        pytest.raises(ExportError, match=reason) as caught,
        patched(Branching, [replace(PATCH, **change)]),
    ):
        pass
    assert "constraints.txt" in caught.value.hint
    assert sys.modules[Branching.__module__].Branching is Branching


@pytest.mark.parametrize("row", [row for row in MODELS if row.patches], ids=lambda row: row.model)
def test_patches_of_the_table_fit_the_installed_diffusers(row: Row) -> None:
    with patched(getattr(diffusers, row.model), row.patches):
        pass


@pytest.mark.nightly
def test_hunyuan_videos_image_of_zeros_is_no_image() -> None:
    """A branch in diffusers, a value of the mask in the cut; and padding in the middle of the text."""
    one = case("hunyuan_video_15")
    config: Any = one.model.config
    inputs = random_inputs(one.row, config, one.row.sizes(config))
    inputs["image_embeds"] = torch.zeros_like(inputs["image_embeds"])
    inputs["encoder_attention_mask"][:, 1] = 0
    (found,), (expected,) = (
        chain(one.cut, one.weights, inputs),
        eager(one.row, one.model, inputs),
    )
    assert relative_error(found, expected) < 1e-5
