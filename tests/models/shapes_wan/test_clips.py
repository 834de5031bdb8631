# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from clips import (
    BACKGROUNDS,
    COLORS,
    MOTIONS,
    SHAPES,
    Caption,
    ClipSpec,
    all_captions,
    draw_spec,
    pixel_centers,
    render,
    sample,
    signed_distance,
    training_specs,
    unseen_captions,
)

CENTERED = {"center_x": 0.0, "center_y": 0.0, "radius": 0.4, "amplitude": 0.5}


def test_same_seed_draws_same_clip():
    first, first_caption = sample(torch.Generator().manual_seed(3))
    second, second_caption = sample(torch.Generator().manual_seed(3))
    other, _ = sample(torch.Generator().manual_seed(4))
    assert first_caption == second_caption
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_first_training_clip_is_the_one_the_checkpoint_was_trained_on():
    # Taken from the run that made the checkpoint; another order of draws would change it.
    assert str(training_specs(1)[0].caption) == "a white triangle moving left on a navy background"


def test_clip_has_requested_shape_and_range():
    clip, _ = sample(torch.Generator().manual_seed(0), frames=5, size=64)
    assert clip.shape == (3, 5, 64, 64)
    assert -1 <= clip.min() < clip.max() <= 1


def test_captions_cover_every_combination_once():
    captions = all_captions()
    assert len(captions) == len(set(map(str, captions))) == 8 * 5 * 8 * 4
    assert str(captions[0]) == "a red circle moving right on a black background"


def test_unseen_captions_are_in_no_training_clip_but_their_words_are():
    unseen = unseen_captions()
    seen = {spec.caption for spec in training_specs()}
    assert len(unseen) >= 64
    assert seen.isdisjoint(unseen)
    for field in ("color", "shape", "motion", "background"):
        words = {getattr(caption, field) for caption in unseen}
        assert words <= {getattr(caption, field) for caption in seen}


def test_draws_are_spread_over_all_words():
    captions = [draw_spec(torch.Generator().manual_seed(seed)).caption for seed in range(400)]
    assert {caption.color for caption in captions} == set(COLORS)
    assert {caption.shape for caption in captions} == set(SHAPES)
    assert {caption.motion for caption in captions} == set(MOTIONS)
    assert {caption.background for caption in captions} == set(BACKGROUNDS)


@pytest.mark.parametrize("shape", SHAPES)
def test_edges_are_anti_aliased(shape):
    spec = ClipSpec(Caption("white", shape, "standing still", "black"), **CENTERED)
    red = render(spec, frames=1)[0, 0]
    between = ((red > -0.6) & (red < 0.6)).float().mean()
    assert 0.005 < between < 0.15


@pytest.mark.parametrize("shape", ["circle", "ring"])
def test_round_shape_spinning_equals_standing_still(shape):
    spinning = ClipSpec(Caption("red", shape, "spinning", "navy"), **CENTERED)
    still = ClipSpec(Caption("red", shape, "standing still", "navy"), **CENTERED)
    torch.testing.assert_close(render(spinning), render(still), atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", ["square", "triangle", "star"])
def test_angular_shape_spinning_differs_from_standing_still(shape):
    spinning = ClipSpec(Caption("red", shape, "spinning", "navy"), **CENTERED)
    still = ClipSpec(Caption("red", shape, "standing still", "navy"), **CENTERED)
    assert (render(spinning) - render(still)).abs().max() > 0.5


def test_unknown_shape_names_the_known_ones():
    x, y = pixel_centers(4)
    with pytest.raises(ValueError, match=r"shape: found 'cube', expected one of 'circle'.*; pass"):
        signed_distance("cube", x, y, torch.tensor(0.3))
