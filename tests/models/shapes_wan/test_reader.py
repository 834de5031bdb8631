# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch
from clips import MOTIONS, SHAPES, Caption, ClipSpec, render, sample
from reader import Reading, compare_reading, is_motion_readable, read_clip

CLIPS = 200
LEAST_AGREEMENT = 0.97  # a reader worse than this could not judge a model at 95 %


def as_frames(clip):
    return ((clip + 1) / 2).permute(1, 2, 3, 0).numpy()


def draw(color, shape, motion, background):
    spec = ClipSpec(Caption(color, shape, motion, background), 0.05, -0.1, 0.33, 0.45)
    return as_frames(render(spec))


@pytest.fixture(scope="module")
def readings():
    generator = torch.Generator().manual_seed(987)
    clips = [sample(generator) for _ in range(CLIPS)]
    return [(caption, read_clip(as_frames(clip))) for clip, caption in clips]


@pytest.mark.parametrize("word", ["color", "motion", "background", "shape"])
def test_reader_agrees_with_captions_of_procedural_clips(readings, word):
    agreements = [compare_reading(caption, reading) for caption, reading in readings]
    assert np.mean([getattr(agreement, word) for agreement in agreements]) >= LEAST_AGREEMENT


def test_reader_agrees_on_motions_that_can_be_seen(readings):
    readable = [
        compare_reading(caption, reading).motion
        for caption, reading in readings
        if is_motion_readable(caption)
    ]
    assert len(readable) > CLIPS / 2
    assert np.mean(readable) >= LEAST_AGREEMENT


def test_captions_of_other_clips_are_refused(readings):
    # Each reading against the next clip's caption: by chance 1/8, 1/8 and more, 1/4 and 1/5 agree.
    others = [caption for caption, _ in readings[1:] + readings[:1]]
    agreements = [
        compare_reading(caption, reading)
        for caption, (_, reading) in zip(others, readings, strict=True)
    ]
    assert np.mean([agreement.color for agreement in agreements]) < 0.25
    assert np.mean([agreement.motion for agreement in agreements]) < 0.3
    assert np.mean([agreement.background for agreement in agreements]) < 0.4
    assert np.mean([agreement.shape for agreement in agreements]) < 0.35


def test_uint8_and_float_frames_read_alike():
    frames = draw("cyan", "star", "spinning", "brown")
    from_bytes = read_clip((frames * 255).round().astype(np.uint8))
    from_floats = read_clip(frames)
    assert from_bytes.motion == from_floats.motion == "spinning"
    assert from_bytes.overlap == pytest.approx(from_floats.overlap, abs=0.02)


def test_spin_measures_its_angle():
    for shape in ("square", "triangle", "star"):
        reading = read_clip(draw("red", shape, "spinning", "gray"))
        assert reading.turn == pytest.approx(1.5 * np.pi, rel=0.02)


@pytest.mark.parametrize("motion", MOTIONS)
def test_reversed_clip_reads_as_the_opposite_motion(motion):
    opposite = {
        "moving right": "moving left",
        "moving left": "moving right",
        "moving up": "moving down",
        "moving down": "moving up",
        "growing": "shrinking",
        "shrinking": "growing",
    }.get(motion, motion)
    frames = draw("orange", "triangle", motion, "navy")
    assert read_clip(frames[::-1].copy()).motion == opposite


def test_empty_clip_has_a_background_and_nothing_else():
    frames = np.full((17, 96, 96, 3), (0.06, 0.09, 0.28))
    reading = read_clip(frames)
    assert reading == Reading(color=None, background="navy", motion=None, shape=None)


def test_clip_that_changes_colour_half_way_has_no_colour():
    red = draw("red", "circle", "standing still", "black")
    green = draw("green", "circle", "standing still", "black")
    assert read_clip(np.concatenate([red[:9], green[9:]])).color is None


def test_shape_that_vanishes_is_not_read():
    frames = draw("red", "square", "standing still", "black")
    frames[6:] = frames[0, :1, :1]
    assert read_clip(frames).shape is None


@pytest.mark.parametrize("shape", SHAPES)
def test_only_round_shapes_may_stand_still_for_spinning(shape):
    still = Reading(color="red", background="gray", motion="standing still", shape=shape)
    caption = Caption("red", shape, "spinning", "gray")
    is_round = shape in {"circle", "ring"}
    assert compare_reading(caption, still).motion is is_round
    assert is_motion_readable(caption) is not is_round


def test_round_shapes_must_still_move_as_told():
    still = Reading(color="red", background="gray", motion="standing still", shape="circle")
    assert not compare_reading(Caption("red", "circle", "moving up", "gray"), still).motion
    moving = Reading(color="red", background="gray", motion="moving up", shape="circle")
    assert not compare_reading(Caption("red", "circle", "spinning", "gray"), moving).motion
