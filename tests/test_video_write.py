"""Writing videos: round trip, atomic, clear errors."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from localmotion.errors import LocalmotionError
from localmotion.video import decode, probe, video_ref
from localmotion.video.write import write_video
from video_files import moving_square


def smooth(frames: int, height: int, width: int) -> NDArray[np.uint8]:
    y, x, t = np.meshgrid(np.arange(height), np.arange(width), np.arange(frames), indexing="ij")
    parts = [128 + 100 * np.sin((x + 2 * t) / 9), 128 + 100 * np.cos((y - t) / 7), 128 + 100 * np.sin((x + y) / 11)]
    return np.stack(parts, -1).transpose(2, 0, 1, 3).astype(np.uint8)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (47, 61)])
def test_round_trip(tmp_path: Path, height: int, width: int) -> None:
    video = smooth(12, height, width)
    path = tmp_path / "made/on/the/way/clip.mp4"
    write_video(path, video, fps=25)
    info = probe(video_ref(path))
    assert (info.frames, info.height, info.width, info.codec) == (12, height, width, "h264")
    assert info.fps == pytest.approx(25)
    error = decode(video_ref(path), None).astype(float) - video
    assert 10 * np.log10(255**2 / np.mean(error**2)) > 33
    assert os.listdir(path.parent) == ["clip.mp4"]


def test_quality_and_rate_are_obeyed(tmp_path: Path) -> None:
    video = smooth(12, 64, 64)
    for name, crf in (("fine", 5), ("coarse", 45)):
        write_video(tmp_path / f"{name}.mp4", iter(video), fps=7.5, crf=crf)
    assert probe(video_ref(tmp_path / "fine.mp4")).fps == pytest.approx(7.5)
    sizes = [(tmp_path / f"{name}.mp4").stat().st_size for name in ("fine", "coarse")]
    assert sizes[0] > 2 * sizes[1]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    write_video(path, moving_square(3), fps=10)
    before = path.read_bytes()

    def interrupted() -> Iterator[NDArray[np.uint8]]:
        yield from moving_square(3)
        raise RuntimeError("rendering broke")

    with pytest.raises(RuntimeError, match="rendering broke"):
        write_video(path, interrupted(), fps=10)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["clip.mp4"]


def test_what_cannot_be_written_is_told(tmp_path: Path) -> None:
    good = moving_square(2)
    wrong = [good.astype(np.float32), good[..., :1], good[:0], [good[0], good[1, :20]]]
    for frames in wrong:
        with pytest.raises(ValueError):
            write_video(tmp_path / "clip.mp4", frames, fps=10)  # type: ignore[arg-type]
    (tmp_path / "file").write_text("")
    with pytest.raises(LocalmotionError, match="cannot write the video"):
        write_video(tmp_path / "file/clip.mp4", good, fps=10)
    assert os.listdir(tmp_path) == ["file"]
