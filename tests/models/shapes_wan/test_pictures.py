# SPDX-License-Identifier: Apache-2.0
import imageio.v3 as iio
import numpy as np
import pytest
import torch
from clips import Caption
from generate import Pair
from pictures import (
    draw_contact_sheet,
    draw_residual_changes,
    measure_residual_changes,
    recorded_residuals,
    relative_changes,
)
from torch import nn

PAIR = Pair(Caption("red", "circle", "moving up", "gray"), seed=5)


class TwoBlocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, hidden_states):
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return hidden_states


def test_recorded_residual_is_last_output_minus_first_input():
    model, inputs = TwoBlocks(), torch.randn(1, 3, 4)
    with recorded_residuals(model) as residuals, torch.no_grad():
        outputs = [model(inputs), model(2 * inputs)]
    torch.testing.assert_close(residuals[0], outputs[0] - inputs)
    torch.testing.assert_close(residuals[1], outputs[1] - 2 * inputs)


def test_hooks_are_removed_even_after_an_error():
    model = TwoBlocks()
    with pytest.raises(RuntimeError), recorded_residuals(model):
        model(torch.randn(1, 3, 5))
    assert not model.blocks[0]._forward_pre_hooks
    assert not model.blocks[-1]._forward_hooks


def test_relative_change_is_mean_absolute_difference_over_mean_absolute_former():
    residuals = [torch.tensor([2.0, -2.0]), torch.tensor([3.0, -1.0]), torch.tensor([3.0, -1.0])]
    assert relative_changes(residuals) == [0.5, 0.0]


def test_residual_changes_have_one_curve_per_branch_and_fall_after_the_start(pipeline):
    curves = measure_residual_changes(pipeline, [PAIR], steps=12, guidance_scale=3.0)
    assert set(curves) == {"cond", "uncond"}
    for (curve,) in curves.values():
        assert len(curve) == 11
        assert all(np.isfinite(curve))
        # A trained model's residual settles in the middle of the run and moves at both ends.
        assert min(curve[3:8]) < 0.6 * curve[0]
        assert min(curve[3:8]) < 0.6 * curve[-1]
    assert curves["cond"] != curves["uncond"]


def test_pictures_are_drawn(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (17, 96, 96, 3), dtype=np.uint8)
    draw_contact_sheet([PAIR, PAIR], [noise, noise], tmp_path / "sheet.png")
    curve = [[0.3, 0.1, 0.2]]
    draw_residual_changes({"cond": curve, "uncond": curve}, tmp_path / "change.png")
    for name in ("sheet.png", "change.png"):
        picture = iio.imread(tmp_path / name)
        assert picture.shape[0] > 200
        assert picture.std() > 5
