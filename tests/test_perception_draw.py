"""Contact sheet and film of a clip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from localmotion.cli import main
from localmotion.errors import StoreError
from localmotion.perception.draw import _tail, flow_colours, inspect
from localmotion.video.decode import probe, video_ref
from localmotion.video.store import Clip, ClipStore


def test_colours_tell_direction_and_magnitude() -> None:
    field = np.array([[0, 0], [1, 0], [0, 1], [-1, 0], [0, -1], [5, 0], [0.5, 0]], np.float32)
    white, right, down, left, up, more, half = flow_colours(field, 1.0).astype(int)
    assert (white == 255).all()
    assert right.tolist() == more.tolist() == [255, 0, 0]
    assert half[0] == 255
    assert half[1] == pytest.approx(127, abs=2)
    assert len({tuple(c) for c in (right, down, left, up)}) == 4
    np.testing.assert_allclose(right + left, 255, atol=12)  # opposite directions have opposite colours
    np.testing.assert_allclose(up + down, 255, atol=12)


def test_a_tail_is_of_one_track_only() -> None:
    tracks = np.arange(12, dtype=np.float32).reshape(6, 1, 2)
    ids = np.array([[0], [0], [3], [3], [3], [3]], np.int32)
    seen = np.array([[1], [1], [1], [0], [1], [1]], bool)
    zeros = np.zeros((6, 4, 4, 3), np.uint8)
    clip = Clip("a", zeros, np.zeros((6, 4, 4, 2), np.float16), tracks, seen, ids)
    assert len(_tail(clip, 0, 1)) == 2
    assert len(_tail(clip, 0, 2)) == 1  # another point before
    assert len(_tail(clip, 0, 5)) == 2  # unseen in frame 3


def test_pictures_and_films_are_drawn(store: Path, tmp_path: Path) -> None:
    clips = ClipStore(store)
    sheet = cv2.imread(str(inspect(clips, tmp_path / "new" / "sheet.png")))
    assert sheet.shape[1] > 1000
    assert sheet.std() > 20
    one = inspect(clips, tmp_path / "one.png", clips.ids[2], frames=3).read_bytes()
    assert one == inspect(clips, tmp_path / "two.png", 2, frames=3).read_bytes()
    film = probe(video_ref(inspect(clips, tmp_path / "film.mp4", 0)))
    assert film.frames == clips.lengths[0] - 1
    assert film.width == 2 * film.height


def test_what_cannot_be_drawn_is_named(store: Path, tmp_path: Path) -> None:
    clips = ClipStore(store)
    with pytest.raises(StoreError, match="nothing"):
        inspect(clips, tmp_path / "a.png", "nothing.mp4")
    with pytest.raises(StoreError, match="clips 0 to 7"):
        inspect(clips, tmp_path / "a.png", 8)
    with pytest.raises(StoreError, match=r"\.png or \.mp4"):
        inspect(clips, tmp_path / "a.gif", 0)


def test_an_id_of_digits_is_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jester's clips are called 00001 and so on."""
    asked: list[Any] = []

    class Store:
        ids = ("00000", "00001", "00003")

        def __init__(self, path: Path) -> None: ...

    monkeypatch.setattr("localmotion.video.store.ClipStore", Store)
    monkeypatch.setattr("localmotion.perception.draw.inspect", lambda store, out, clip: asked.append(clip))
    for clip in ("00001", "2", "other"):
        main(["inspect", str(tmp_path), "--out", str(tmp_path / "a.png"), "--clip", clip])
    assert asked == ["00001", 2, "other"]
