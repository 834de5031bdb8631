"""Named dimensions: what fits, what follows, and what is said of the rest."""

from __future__ import annotations

import pytest

from freewheel.bundle.dims import (
    all_dims,
    check_video,
    derive_dims,
    least,
    match_dims,
    nearest_video,
    shape_of,
    summed,
)
from freewheel.bundle.manifest import IoEntry, LatentScale, SumTerm
from freewheel.bundle.reader import Bundle
from freewheel.core.errors import RequestError

ENTRY = IoEntry(dtype="float32", shape=["batch", 4, "side", "side"])


def test_names_get_the_sizes_found() -> None:
    assert match_dims("latents", ENTRY, (2, 4, 6, 6)) == {"batch": 2, "side": 6}
    assert shape_of(ENTRY, {"batch": 2, "side": 6}) == (2, 4, 6, 6)


@pytest.mark.parametrize(
    "shape", [(2, 4, 6), (2, 5, 6, 6), (2, 4, 6, 7), (0, 4, 6, 6), (2, 4, 6, 6, 1), ()]
)
def test_other_shapes_are_refused_with_what_is_taken(shape: tuple[int, ...]) -> None:
    with pytest.raises(RequestError, match=r"input 'latents'.*takes \[batch, 4, side, side\]"):
        match_dims("latents", ENTRY, shape)


def test_tokens_follow_from_the_patches(tiny_bundle: Bundle) -> None:
    sizes = {"batch": 1, "frames": 3, "height": 8, "width": 6}
    assert derive_dims(tiny_bundle.manifest, sizes)["tokens"] == 3 * 4 * 3
    with pytest.raises(RequestError, match=r"dimension 'width'.*is 7, which 2 does not divide"):
        derive_dims(tiny_bundle.manifest, {**sizes, "width": 7})


PATCHES = {"tokens": [("frames", 2), ("height", 2), ("width", 1)]}


@pytest.mark.parametrize(
    ("name", "size", "scale", "said"),
    [
        (
            "frames",
            9,
            (4, 8),
            r"--frames 9: is not 5 more than a multiple of 8: 2 latent frames are a patch; use 13",
        ),
        ("frames", 1, (4, 8), r"--frames 1: .*; use 5"),
        ("frames", 81, (1, 1), r"--frames 81: is no multiple of 2: 2 latent .*; use 82"),
        ("frames", 0, (1, 1), r"--frames 0: is no multiple of 2: .*; use 2"),
        ("height", 24, (4, 8), r"--height 24: is no multiple of 16; use 32"),
        ("width", 0, (4, 8), r"--width 0: is no multiple of 8; use 8"),
    ],
)
def test_a_video_of_half_a_patch_is_refused(
    name: str, size: int, scale: tuple[int, int], said: str
) -> None:
    stands_for = LatentScale(frames=scale[0], pixels=scale[1])
    with pytest.raises(RequestError, match=said):
        check_video({name: size}, stands_for, PATCHES)
    check_video({name: nearest_video(name, size, stands_for, PATCHES)}, stands_for, PATCHES)


def test_the_nearest_video_is_one_that_fits_itself() -> None:
    for by in (1, 4, 6):
        scale = LatentScale(frames=by, pixels=8)
        for latents in (2, 4, 10):
            frames = (latents - 1) * by + 1
            assert nearest_video("frames", frames, scale, PATCHES) == frames
            assert nearest_video("frames", frames + by - 1, scale, PATCHES) in (
                frames,
                frames + 2 * by,
            )


def test_a_sum_is_of_dimensions_padded_ones_and_numbers() -> None:
    sums: dict[str, list[SumTerm]] = {"joint": [("text_tokens", 32), "tokens", 3], "fixed": [16]}
    assert summed(sums, {"text_tokens": 33, "tokens": 5}) == {"joint": 64 + 5 + 3, "fixed": 16}
    assert summed(sums, {"text_tokens": 64, "tokens": 1})["joint"] == 64 + 1 + 3
    assert summed(sums, {"tokens": 5}) == {"fixed": 16}, "the text's size is still to come"


def test_a_sum_that_takes_more_than_there_is_is_refused() -> None:
    sums: dict[str, list[SumTerm]] = {"poses": ["frames", -1], "faces": ["frames"] * 4 + [-7]}
    assert summed(sums, {"frames": 2}) == {"poses": 1, "faces": 1}
    with pytest.raises(RequestError, match=r"dimension 'poses': is 0,.*choose larger ones"):
        summed(sums, {"frames": 1})
    assert (least(sums, "frames"), least(sums, "height"), least({}, "frames")) == (2, 1, 1)
    assert least({"faces": ["frames"] * 4 + [-8], "more": ["frames", 3]}, "frames") == 3


def test_what_derives_from_a_sum_follows_it() -> None:
    factors = {"patches": [("height", 2), ("width", 2)], "tokens_per_frame": [("tokens", 1)]}
    found = all_dims(factors, {"tokens": ["patches", "text"]}, {"height": 4, "width": 6, "text": 5})
    assert (found["patches"], found["tokens"], found["tokens_per_frame"]) == (6, 11, 11)
    assert all_dims(factors, {}, {"tokens": 3}) == {"tokens": 3, "tokens_per_frame": 3}


def test_dimensions_of_inputs_still_to_come_wait_for_them(tiny_bundle: Bundle) -> None:
    assert derive_dims(tiny_bundle.manifest, {"batch": 1, "tokens": 36}) == {
        "batch": 1,
        "tokens": 36,
    }


def test_a_dimension_given_and_derived_has_one_size(tiny_bundle: Bundle) -> None:
    sizes = {"batch": 1, "frames": 3, "height": 8, "width": 6, "tokens": 36}
    assert derive_dims(tiny_bundle.manifest, sizes)["tokens"] == 36
    with pytest.raises(RequestError, match=r"'tokens'.*is 35, but frames · height · width give 36"):
        derive_dims(tiny_bundle.manifest, {**sizes, "tokens": 35})
