"""Videos written and read again, and what is left when writing fails."""

from __future__ import annotations

from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
from PIL import Image

from freewheel.core.errors import DependencyError, OutputError, RequestError
from freewheel.runtime.pipeline.video import (
    FRAMES,
    SUFFIXES,
    check_output,
    contact_sheet,
    open_frames,
    write_video,
)


def ramp(frames: int = 5, height: int = 32, width: int = 48) -> np.ndarray:
    """A square that moves right over a dark ground."""
    video = np.full((frames, height, width, 3), 20, dtype=np.uint8)
    for index in range(frames):
        video[index, 8:24, index * 6 : index * 6 + 16] = (200, 60, 40)
    return video


@pytest.mark.parametrize(("suffix", "tolerance"), [(".mp4", 8.0), (".gif", 4.0), (".webp", 4.0)])
def test_frames_come_back(tmp_path: Path, suffix: str, tolerance: float) -> None:
    path = tmp_path / f"video{suffix}"
    write_video(ramp(), path)
    found = np.stack([np.asarray(frame) for frame in open_frames(path, "--video")])
    assert found.shape == ramp().shape
    assert np.abs(found.astype(int) - ramp()).mean() < tolerance
    assert list(tmp_path.iterdir()) == [path]


def test_png_shows_the_frames_side_by_side(tmp_path: Path) -> None:
    write_video(ramp(), tmp_path / "video.png")
    np.testing.assert_array_equal(iio.imread(tmp_path / "video.png"), np.hstack(list(ramp())))


def test_odd_sizes_lose_a_line_in_mp4(tmp_path: Path) -> None:
    write_video(ramp(height=33, width=47), tmp_path / "video.mp4")
    assert iio.imread(tmp_path / "video.mp4").shape[1:3] == (32, 46)


def test_unknown_suffix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        OutputError, match=r"suffix '\.avi'.*use one of \.mp4, \.gif, \.webp, \.png"
    ):
        check_output(tmp_path / "video.avi")


def test_a_place_that_cannot_be_written_is_told_before_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OutputError, match=r"can't be written.*choose another --out"):
        check_output(tmp_path / "file" / "video.mp4")


@pytest.mark.parametrize("fps", [0, -5, 1001])
@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".webp"])
def test_frames_per_second_are_bounded(tmp_path: Path, suffix: str, fps: int) -> None:
    with pytest.raises(RequestError, match=rf"--fps {fps}: is outside \[1, 1000\]; use 8 to 30"):
        write_video(ramp(), tmp_path / f"video{suffix}", fps)
    assert list(tmp_path.iterdir()) == []


def test_frames_are_no_sound(tmp_path: Path) -> None:
    assert set(SUFFIXES) - set(FRAMES) == {".wav"}
    check_output(tmp_path / "sound.wav")
    with pytest.raises(OutputError, match=r"has suffix '\.wav'; use one of \.mp4, \.gif"):
        write_video(ramp(), tmp_path / "sound.wav")
    assert list(tmp_path.iterdir()) == []


def test_the_folder_is_made_with_the_video(tmp_path: Path) -> None:
    path = tmp_path / "new" / "video.png"
    check_output(path)
    assert not path.parent.exists()
    write_video(ramp(), path)
    assert path.exists()


def test_nothing_half_written_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, *_: object, **__: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(iio, "imwrite", full)
    monkeypatch.setattr(Image.Image, "save", lambda _, path, **__: full(path))
    for suffix in FRAMES:
        with pytest.raises(OutputError, match="No space left"):
            write_video(ramp(), tmp_path / f"video{suffix}")
        assert list(tmp_path.iterdir()) == []


def test_mp4_alone_wants_a_package_and_says_so_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("freewheel.core.extras.find_spec", lambda _: None)
    with pytest.raises(DependencyError, match=r"--out .*video\.mp4: needs imageio, imageio-ffmpeg"):
        check_output(tmp_path / "video.mp4")
    for suffix in (".gif", ".webp", ".png"):
        write_video(ramp(), tmp_path / f"video{suffix}")


def test_contact_sheet_has_a_row_per_video() -> None:
    one = contact_sheet({"uncached": ramp()}, columns=3)
    two = contact_sheet({"uncached": ramp(), "teacache": ramp() // 2}, columns=3)
    assert two.shape == (2 * one.shape[0], one.shape[1], 3)
    # First and last frame of the first row, enlarged twice, below its label.
    np.testing.assert_array_equal(one[20 : 20 + 64, 4 : 4 + 96][::2, ::2], ramp()[0])
    np.testing.assert_array_equal(one[20 : 20 + 64, -100:-4][::2, ::2], ramp()[-1])
