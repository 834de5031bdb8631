# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from clips import Caption, unseen_captions
from generate import Pair, generate_clips, held_out_pairs, tuning_pairs
from reader import compare_reading, read_clip

STEPS = 12


def test_held_out_captions_were_not_trained_on():
    pairs = held_out_pairs(64)
    assert {pair.caption for pair in pairs} <= set(unseen_captions())
    assert len({pair.caption for pair in pairs}) == 64


def test_tuning_shares_nothing_with_held_out():
    held_out, tuning = held_out_pairs(77), tuning_pairs(77)
    assert {pair.caption for pair in held_out}.isdisjoint(pair.caption for pair in tuning)
    assert {pair.seed for pair in held_out}.isdisjoint(pair.seed for pair in tuning)


def test_too_many_pairs_say_how_many_there_are():
    with pytest.raises(ValueError, match="count: found 99, expected at most 77; ask for fewer"):
        held_out_pairs(99)


@pytest.fixture(scope="module")
def pair():
    return Pair(Caption("green", "square", "moving down", "navy"), seed=77)


@pytest.fixture(scope="module")
def clip(pipeline, pair):
    return next(generate_clips(pipeline, [pair], steps=STEPS, guidance_scale=3.0))


def test_generated_clip_shows_the_captions_colour_and_background(clip, pair):
    agreement = compare_reading(pair.caption, read_clip(clip))
    assert agreement.color
    assert agreement.background


def test_generated_clip_is_bytes_of_the_trained_size(clip):
    assert clip.shape == (17, 96, 96, 3)
    assert clip.dtype == np.uint8


def test_clip_does_not_depend_on_its_batch(pipeline, clip, pair):
    other = Pair(Caption("red", "ring", "growing", "gray"), seed=78)
    batched = list(generate_clips(pipeline, [other, pair], steps=STEPS, guidance_scale=3.0))[1]
    # Matrix products of another shape may round otherwise; another noise would differ far more.
    assert np.abs(batched.astype(int) - clip.astype(int)).mean() < 0.5
