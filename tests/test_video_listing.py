"""Finding videos: ids, frame folders, list files, links."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from localmotion.errors import VideoError
from localmotion.video import VideoRef, find_videos
from localmotion.video.listing import SERIES, frame_files, usable_videos
from localmotion.video.series import arrange
from video_files import moving_square, save_pictures


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def ids(root: Path, list_file: Path | None = None) -> list[str]:
    return [ref.id for ref in find_videos(root, list_file)]


def usable(root: Path) -> list[str]:
    return [ref.id for ref in find_videos(root) if ref.fault is None]


def faults(root: Path, list_file: Path | None = None) -> dict[str, str]:
    return {ref.id: ref.fault[0] for ref in find_videos(root, list_file) if ref.fault}


def reason(root: Path, list_file: Path | None = None) -> VideoError:
    with pytest.raises(VideoError) as caught:
        find_videos(root, list_file)
    return caught.value


def test_any_tree_sorted_with_extensions_in_any_case(tmp_path: Path) -> None:
    names = ["b/x.MP4", "b/x.webm", "a.mkv", "a/deep/er/v.AVI", "c.MoV", "d.gif", "with space.mp4", "ä.mp4"]
    touch(*(tmp_path / name for name in names), tmp_path / "notes.txt", tmp_path / "one.jpg")
    touch(tmp_path / ".hidden.mp4", tmp_path / ".cache/x.mp4", tmp_path / "b/._x.mp4")
    assert usable(tmp_path) == sorted(names)
    assert faults(tmp_path) == {"one.jpg": "single_picture"}
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
    found = [ref for ref in find_videos(tmp_path) if ref.fault is None]
    assert [(ref.id, ref.kind, ref.frames_hint) for ref in found] == [("17", "frames", 5), ("deep/18", "frames", 3)]
    assert faults(tmp_path) == {"one/000001.jpg": "single_picture", "unnumbered/a.jpg": "loose_pictures"}
    with pytest.raises(VideoError, match="2 pictures are in no series"):
        next(ref for ref in find_videos(tmp_path) if ref.fault and ref.fault[0] == "loose_pictures").check()


def pictures(folder: Path, *names: str) -> None:
    touch(*(folder / name for name in names))


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (["10.jpg", "9.jpg", "0011.JPEG"], ["9.jpg", "10.jpg", "0011.JPEG"]),
        (["1305031102.175304.jpg", "1305031102.6.jpg", "1305031103.000001.jpg"], None),  # TUM RGB-D
        (["rgb_0.250000.png", "rgb_1.000000.png", "rgb_1.750000.png"], None),
        (["1.9.jpg", "1.10.jpg", "1.11.jpg"], None),  # scene and frame, no time
        (["1403636579763555584.png", "1403636579813555456.png"], None),  # EuRoC
        (["frame_0009_rgb.jpg", "frame_10_rgb.jpg"], None),
        (["img_0001_v2.jpg", "img_0002_v2.jpg"], None),
        (["a1.webp", "a2.webp"], None),
        (["1.tif", "2.tiff", "3.TIF"], None),
        (["1.bmp", "2.bmp"], None),
        (["5.png", "10.png", "15.png", "20.png"], None),
    ],
)
def test_a_series_is_in_the_order_of_its_numbers(tmp_path: Path, names: list[str], order: list[str] | None) -> None:
    pictures(tmp_path / "in/clip", *names)
    (ref,) = find_videos(tmp_path / "in")
    assert (ref.id, ref.kind, ref.frames_hint, ref.fault, ref.warning) == ("clip", "frames", len(names), None, "")
    assert [file.name for file in frame_files(ref.path)] == (order or names)


RUN = [f"{n}.jpg" for n in range(1, 16)]


@pytest.mark.parametrize(
    ("names", "found", "told"),
    [
        ([*RUN, *(f"{n}.jpg" for n in range(500, 515))], "gap", ["15.jpg", "500.jpg"]),
        (["1305031102.1.jpg", "1305031102.2.jpg", "1305031102.3.jpg", "1305031109.1.jpg"], "gap", ["1305031102.3.jpg"]),
        (["1.jpg", "0001.jpg", "2.jpg"], "duplicate_numbers", ["0001.jpg and 1.jpg"]),
        (["1.jpg", "2.jpg", "2.jpeg"], "duplicate_numbers", ["2.jpeg and 2.jpg"]),
        (["rgb_1.png", "rgb_2.png", "depth_1.png", "depth_2.png"], "mixed_frames", ["depth_N.png, rgb_N.png"]),
        (["1_rgb.png", "2_rgb.png", "1_depth.png", "2_depth.png"], "mixed_frames", ["N_depth.png, N_rgb.png"]),
        (["cam1_1.png", "cam1_2.png", "cam2_1.png", "cam2_2.png"], "mixed_frames", ["cam1_N.png"]),
    ],
)
def test_series_without_one_clear_order_are_listed_with_the_reason(
    tmp_path: Path, names: list[str], found: str, told: list[str]
) -> None:
    pictures(tmp_path / "in/clip", *names)
    (ref,) = find_videos(tmp_path / "in")
    assert ref.id == "clip"
    with pytest.raises(VideoError) as listed:
        ref.check()
    with pytest.raises(VideoError) as read:  # the folder alone, without the listing
        frame_files(tmp_path / "in/clip")
    assert listed.value.reason == read.value.reason == found
    assert all(text in listed.value.detail for text in told), listed.value.detail


def test_a_few_skipped_numbers_are_a_warning_and_strides_are_none(tmp_path: Path) -> None:
    pictures(tmp_path / "dropped", *RUN[:7], *RUN[8:])
    pictures(tmp_path / "stride", *RUN[::2])
    found = {ref.id: (ref.fault, ref.warning) for ref in find_videos(tmp_path)}
    assert found == {"dropped": (None, "skipped_numbers: in 1 places, first behind 7.jpg"), "stride": (None, "")}


def test_a_series_keeps_its_id_and_frames_whatever_other_pictures_come(tmp_path: Path) -> None:
    pictures(tmp_path / "clip", *RUN)
    before = find_videos(tmp_path / "clip"), frame_files(tmp_path / "clip")
    pictures(
        tmp_path / "clip", "cover.jpg", "x_1_mask.png", "x_2_mask.png", "1.bmp", "2.bmp", "3.heic", ".hidden.jpg", "Thumbs.db"
    )
    after = find_videos(tmp_path / "clip")
    assert before == ([ref for ref in after if not ref.fault], frame_files(tmp_path / "clip"))
    assert {ref.id: ref.fault[0] for ref in after if ref.fault} == {"1.bmp": "loose_pictures", "3.heic": "unsupported_picture"}
    assert "5 pictures" in next(ref.fault[1] for ref in after if ref.fault and ref.id == "1.bmp")


def test_series_within_series_and_beside_folders_with_videos_are_all_found(tmp_path: Path) -> None:
    for folder in ("in", "in/clip", "in/clip/masks", "in/in"):
        pictures(tmp_path / folder, *RUN)
    touch(tmp_path / "in/films/a.mp4")
    # The root's own pictures have its name, unless a folder in it has that.
    assert usable(tmp_path / "in") == ["./in", "clip", "clip/masks", "films/a.mp4", "in"]
    assert usable(tmp_path / "in/clip") == ["clip", "masks"]


def test_a_series_and_videos_in_one_folder(tmp_path: Path) -> None:
    many = [f"{n:04d}.png" for n in range(SERIES)]
    pictures(tmp_path / "frames", *many, "preview.mp4")
    pictures(tmp_path / "stills", *many[:-1], "v.mp4")
    pictures(tmp_path / "covers", *many, "0000.mp4", "0001.mp4")
    pictures(tmp_path / "cover", "v.mp4", "v.jpg")
    assert usable(tmp_path) == ["cover/v.mp4", "covers/0000.mp4", "covers/0001.mp4", "frames", "stills/v.mp4"]
    shadowed = {"covers", "frames/preview.mp4", "stills"}
    assert faults(tmp_path) == {**dict.fromkeys(shadowed, "shadowed"), "cover/v.jpg": "single_picture"}
    # A list that names what is shadowed has chosen it, and a cover does not make its video's name ambiguous.
    listed = write_list(tmp_path / "list.txt", "covers 25 1", "preview 25 2", "stills 24 3", "v.jpg 1 0", "cover/v 9 4")
    assert faults(tmp_path, listed) == {"cover/v.jpg": "single_picture"}
    assert {ref.id: ref.label for ref in find_videos(tmp_path, listed) if not ref.fault} == {
        "covers": 1,
        "frames/preview.mp4": 2,
        "stills": 3,
        "cover/v.mp4": 4,
    }


def test_what_is_like_a_video_and_not_read_has_its_reason(tmp_path: Path) -> None:
    used = ["a.M4V", "a.3gp", "a.ts", "a.mts", "a.m2ts", "a.mpg", "a.mpeg", "a.wmv", "a.flv", "a.ogv", "a.mjpeg"]
    other = ["b.rmvb", "b.mxf", "b.y4m", "b.zip", "b.tar.gz", "b.mp4.gz", "b.RAR"]
    touch(*(tmp_path / name for name in [*used, *other]), tmp_path / "b.mp4.part", tmp_path / "pic.heic")
    touch(*(tmp_path / name for name in ("sound.wav", "a.npz.gz", "notes.gz", "Thumbs.db", ".DS_Store", "._a.mp4", "x.part")))
    (tmp_path / "app.ts").write_text("export const 視 = 1;\n" * 1000)
    (tmp_path / "empty.ts").write_bytes(b"")
    for name in ("a.ts", "a.mts"):
        (tmp_path / name).write_bytes(b"\x47\x40\0\x10" + bytes(184))
    assert usable(tmp_path) == sorted([*used, "empty.ts"])
    assert faults(tmp_path) == {
        **dict.fromkeys(other, "unsupported_container"),
        "b.mp4.part": "unfinished",
        "pic.heic": "unsupported_picture",
    }
    assert all(ref.fault[1] for ref in find_videos(tmp_path) if ref.fault)
    assert [ref.fault for ref in usable_videos(tmp_path)] == [None] * (len(used) + 1)
    touch(tmp_path / "only/c.zip")
    with pytest.raises(VideoError, match="archive"):
        usable_videos(tmp_path / "only")


def test_a_folder_of_very_many_frames_is_listed_in_linear_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what is done, not by the clock: each name is looked at so many times, however many there are."""
    calls = 0
    real = os.path.splitext

    def counted(name: str) -> tuple[str, str]:
        nonlocal calls
        calls += 1
        return real(name)

    monkeypatch.setattr("localmotion.video.series.os.path.splitext", counted)
    arranged = arrange(f"{n}.jpg" for n in range(20_000))
    assert (len(arranged.files), arranged.files[-1], arranged.fault) == (20_000, "19999.jpg", None)
    assert calls <= 5 * 20_000


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
