"""Finding videos: ids, frame folders, list files, links."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from localmotion.errors import VideoError
from localmotion.video import VideoRef, find_videos
from video_files import moving_square, save_pictures


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def ids(root: Path, list_file: Path | None = None) -> list[str]:
    return [ref.id for ref in find_videos(root, list_file)]


def reason(root: Path, list_file: Path | None = None) -> VideoError:
    with pytest.raises(VideoError) as caught:
        find_videos(root, list_file)
    return caught.value


def test_any_tree_sorted_with_extensions_in_any_case(tmp_path: Path) -> None:
    names = ["b/x.MP4", "b/x.webm", "a.mkv", "a/deep/er/v.AVI", "c.MoV", "d.gif", "with space.mp4", "ä.mp4"]
    touch(*(tmp_path / name for name in names), tmp_path / "notes.txt", tmp_path / "one.jpg")
    touch(tmp_path / ".hidden.mp4", tmp_path / ".cache/x.mp4", tmp_path / "b/._x.mp4")
    assert ids(tmp_path) == sorted(names)
    ref = find_videos(tmp_path)[0]
    assert ref == VideoRef("a.mkv", tmp_path / "a.mkv", "file")


def test_an_id_does_not_change_when_other_files_appear(tmp_path: Path) -> None:
    touch(tmp_path / "x.mp4")
    before = ids(tmp_path)
    touch(tmp_path / "x.webm", tmp_path / "x.mkv")
    save_pictures(tmp_path / "x", moving_square(2))
    assert set(before) < set(ids(tmp_path))
    assert len(set(ids(tmp_path))) == 4


def test_a_single_file_is_a_folder_of_one(tmp_path: Path) -> None:
    touch(tmp_path / "x.mp4", tmp_path / "x.txt")
    assert ids(tmp_path / "x.mp4") == ["x.mp4"]
    assert reason(tmp_path / "x.txt").reason == "empty"


def test_frame_folders(tmp_path: Path) -> None:
    save_pictures(tmp_path / "17", moving_square(5))
    save_pictures(tmp_path / "deep/18", moving_square(3), "frame_{}.png", first=8)
    save_pictures(tmp_path / "one", moving_square(1))
    touch(tmp_path / "unnumbered/a.jpg", tmp_path / "unnumbered/b.jpg")
    # Pictures beside or above videos are covers and thumbnails, not a video.
    save_pictures(tmp_path / "thumbs", moving_square(4))
    touch(tmp_path / "thumbs/v.mp4")
    save_pictures(tmp_path / "above", moving_square(4))
    touch(tmp_path / "above/sub/v.mp4")
    found = find_videos(tmp_path)
    assert [ref.id for ref in found] == ["17", "above/sub/v.mp4", "deep/18", "thumbs/v.mp4"]
    assert [(ref.kind, ref.frames_hint) for ref in found if ref.kind == "frames"] == [("frames", 5), ("frames", 3)]


def test_the_root_itself_may_be_a_frame_folder(tmp_path: Path) -> None:
    assert ids(save_pictures(tmp_path / "clip", moving_square(3))) == ["clip"]


def test_links_are_followed_once_and_loops_end(tmp_path: Path) -> None:
    root, other = tmp_path / "root", tmp_path / "other"
    touch(root / "z/real.mp4", other / "linked.mp4", root / "x.mp4")
    (root / "a_loop").symlink_to(root)
    (root / "z/loop").symlink_to(root / "z")
    (root / "a_link").symlink_to(root / "z")
    (root / "outside").symlink_to(other)
    (root / "file_link.mp4").symlink_to(other / "linked.mp4")
    (root / "dangling.mp4").symlink_to(other / "nothing.mp4")
    # A real folder keeps its own name although a link to it sorts first; a broken link is found, for the scan to tell.
    assert ids(root) == ["dangling.mp4", "file_link.mp4", "outside/linked.mp4", "x.mp4", "z/real.mp4"]


def test_missing_and_empty_folders_say_so(tmp_path: Path) -> None:
    error = reason(tmp_path / "nowhere")
    assert (error.reason, str(tmp_path / "nowhere") in str(error)) == ("missing", True)
    touch(tmp_path / "readme.txt")
    error = reason(tmp_path)
    assert error.reason == "empty"
    assert ".mp4" in error.detail


def write_list(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def test_list_files_name_stems_paths_and_frame_folders(tmp_path: Path) -> None:
    touch(tmp_path / "v/100.webm", tmp_path / "v/200.webm", tmp_path / "v/300.webm", tmp_path / "v/my clip.mp4")
    save_pictures(tmp_path / "v/400", moving_square(3))
    listed = write_list(tmp_path / "train.txt", "400 3 7", "", "100\t45   93", "v/200.webm 30 push", "my clip 12 -1")
    found = find_videos(tmp_path, listed)
    assert [(ref.id, ref.frames_hint, ref.label) for ref in found] == [
        ("v/100.webm", 45, 93),
        ("v/200.webm", 30, "push"),
        ("v/400", 3, 7),
        ("v/my clip.mp4", 12, -1),
    ]
    assert [ref.kind for ref in found] == ["file", "file", "frames", "file"]


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (["100 45 1", "no1 3 1", "no2 3 1"], ["2 of 3", "'no1'"]),
        (["../100 45 1"], ["1 of 1", "'../100'"]),
        (["100 45"], ["line 1"]),
        (["100 many 1"], ["line 1"]),
        (["100 45 1", "v/100.webm 45 1"], ["line 2", "twice"]),
        (["300 45 1"], ["line 1", "v/300.mp4", "v/300.webm"]),
    ],
)
def test_bad_lists_are_refused_with_what_is_wrong(tmp_path: Path, lines: list[str], told: list[str]) -> None:
    touch(tmp_path / "v/100.webm", tmp_path / "v/300.webm", tmp_path / "v/300.mp4")
    error = reason(tmp_path, write_list(tmp_path / "list.txt", *lines))
    assert error.reason == "bad_list"
    assert all(text in error.detail for text in told), error.detail


def test_unreadable_lists(tmp_path: Path) -> None:
    touch(tmp_path / "100.webm")
    assert reason(tmp_path, tmp_path / "nowhere.txt").reason == "missing"
    assert reason(tmp_path, write_list(tmp_path / "empty.txt", "")).reason == "empty"
    (tmp_path / "binary.txt").write_bytes(np.random.default_rng(0).bytes(100))
    assert reason(tmp_path, tmp_path / "binary.txt").reason == "bad_list"
