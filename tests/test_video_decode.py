"""Decoding: every container, rotation, depth; faults become VideoError with a reason and no noise."""

from __future__ import annotations

import ast
import os
import tomllib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from localmotion.errors import VideoError
from localmotion.video import decode, iter_frames, probe, video_ref
from localmotion.video.libav import LENIENT_METADATA
from video_files import encode, encode_sound, moving_square, remux, save_pictures, set_display_matrix

T = 30


@pytest.fixture(scope="module")
def square(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encode(tmp_path_factory.mktemp("square") / "square.mp4", moving_square(T))


def reason_of(path: Path, size: int | None = 32) -> VideoError:
    with pytest.raises(VideoError) as caught:
        decode(video_ref(path), size)
    assert caught.value.path == str(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".webm", ".avi", ".gif", ".MP4"])
def test_every_container_gives_all_frames_in_rgb(tmp_path: Path, suffix: str) -> None:
    video = moving_square(T)
    path = encode(tmp_path / f"clip{suffix.lower()}", video)
    path = path.rename(tmp_path / f"clip{suffix}")
    info = probe(video_ref(path))
    assert (info.frames, info.width, info.height, info.rotation, info.vfr) == (T, 64, 48, 0, False)
    assert info.fps == pytest.approx(10, rel=0.02)
    assert info.duration == pytest.approx(3, rel=0.02)
    assert info.pixel_aspect == 1
    native = decode(video_ref(path), None)
    assert native.shape == video.shape
    assert native.dtype == np.uint8
    assert np.abs(native[:, 28:44, 40:60].mean((0, 1, 2)) - (0, 0, 255)).max() < 12
    assert np.abs(native[5, 5:15, 8:18].mean((0, 1)) - (255, 0, 0)).max() < 25
    assert np.abs(native.astype(int) - video).mean() < 6
    small = decode(video_ref(path), 32)
    assert small.shape == (T, 32, 32, 3)
    assert small.flags["C_CONTIGUOUS"]
    # The aspect ratio is squashed: the blue quarter stays a quarter.
    assert np.abs(small[:, 19:29, 19:29].mean((0, 1, 2)) - (0, 0, 255)).max() < 12


def test_resizing_averages_areas(tmp_path: Path) -> None:
    stripes = np.zeros((3, 64, 128, 3), np.uint8)
    stripes[:, :, ::2] = 255
    path = encode(tmp_path / "stripes.mp4", stripes, options={"crf": "0"})
    small = decode(video_ref(path), 32)
    assert np.abs(small.astype(int) - 127).max() < 4


def test_ten_bits_and_odd_sizes(tmp_path: Path) -> None:
    path = encode(tmp_path / "ten.mp4", moving_square(6), pix_fmt="yuv420p10le")
    assert probe(video_ref(path)).bits == 10
    assert np.abs(decode(video_ref(path), None).astype(int) - moving_square(6)).mean() < 6
    odd = moving_square(6, 61, 47)
    path = encode(tmp_path / "odd.mp4", odd, pix_fmt="yuv444p")
    assert (probe(video_ref(path)).width, probe(video_ref(path)).height) == (61, 47)
    assert decode(video_ref(path), None).shape == odd.shape
    assert decode(video_ref(path), 64).shape == (6, 64, 64, 3)


def test_full_range_and_limited_range_agree(tmp_path: Path) -> None:
    grey = np.full((3, 32, 32, 3), 200, np.uint8)
    for pix_fmt in ("yuv420p", "yuvj420p"):
        path = encode(tmp_path / f"{pix_fmt}.mkv", grey, pix_fmt=pix_fmt)
        assert np.abs(decode(video_ref(path), None).astype(int) - 200).max() <= 2, pix_fmt


# Quarter turns of the display matrix, and where QuickTime's rule puts the picture: a point right of the origin moves
# down under (0, 1, -1, 0), i.e. the picture is turned clockwise.
@pytest.mark.parametrize(
    ("matrix", "turns", "degrees"), [((0, 1, -1, 0), -1, 270), ((-1, 0, 0, -1), 2, 180), ((0, -1, 1, 0), 1, 90)]
)
def test_rotation_is_honoured(square: Path, tmp_path: Path, matrix: tuple[int, int, int, int], turns: int, degrees: int) -> None:
    turned = set_display_matrix(square, tmp_path / "turned.mp4", *matrix)
    info = probe(video_ref(turned))
    assert info.rotation == degrees
    assert (info.width, info.height) == ((48, 64) if turns % 2 else (64, 48))
    plain = decode(video_ref(square), None)
    np.testing.assert_array_equal(decode(video_ref(turned), None), np.rot90(plain, turns, (1, 2)))
    assert decode(video_ref(turned), 16).shape == (T, 16, 16, 3)
    small = decode(video_ref(square), 16)
    np.testing.assert_array_equal(decode(video_ref(turned), 16), np.rot90(small, turns, (1, 2)))


def test_variable_frame_rate_and_pixel_aspect_are_told(tmp_path: Path) -> None:
    path = encode(tmp_path / "vfr.mkv", moving_square(6), times=[0, 1, 2, 7, 8, 9])
    assert probe(video_ref(path)).vfr
    assert len(decode(video_ref(path), 16)) == 6
    path = encode(tmp_path / "wide.mp4", moving_square(3), pixel_aspect=Fraction(4, 3))
    assert probe(video_ref(path)).pixel_aspect == pytest.approx(4 / 3)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(start=st.integers(0, T + 3), stride=st.integers(1, 8), limit=st.none() | st.integers(1, T + 3))
def test_start_stride_and_limit_are_slices(square: Path, start: int, stride: int, limit: int | None) -> None:
    want = decode(video_ref(square), 16)[start::stride][:limit]
    have = list(iter_frames(video_ref(square), 16, stride, start=start, max_frames=limit))
    assert len(have) == len(want)
    assert all((a == b).all() for a, b in zip(have, want, strict=True))


def test_nothing_left_is_too_short_and_bad_arguments_are_refused(square: Path) -> None:
    with pytest.raises(VideoError) as caught:
        decode(video_ref(square), 16, start=T)
    assert caught.value.reason == "too_short"
    for wrong in ({"stride": 0}, {"start": -1}, {"max_frames": 0}, {"size": 0}):
        with pytest.raises(ValueError):
            decode(video_ref(square), **({"size": 16} | wrong))


def test_an_abandoned_iterator_closes_its_file(square: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    frames = iter_frames(video_ref(square), 16)
    next(frames)
    assert len(os.listdir("/proc/self/fd")) > before
    frames.close()
    assert len(os.listdir("/proc/self/fd")) == before


# ------------------------------------------------------------------------------------------------------------ versions


def test_metadata_in_another_encoding_is_no_reason_to_refuse_a_video(square: Path, tmp_path: Path) -> None:
    named = tmp_path / "named.mkv"
    with av.open(str(square)) as read, av.open(str(named), "w") as write:
        write.metadata["title"] = "caf#"
        stream = write.add_stream_from_template(read.streams.video[0])
        for packet in read.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                write.mux(packet)
    data = named.read_bytes()
    assert data.count(b"caf#") == 1
    named.write_bytes(data.replace(b"caf#", b"caf\xe9"))  # Latin-1
    np.testing.assert_array_equal(decode(video_ref(named), 16), decode(video_ref(square), 16))
    assert probe(video_ref(named)).frames == T


def test_arguments_given_to_pyav_exist_in_the_installed_one() -> None:
    """PyAV is compiled: its stubs are what has the names of arguments."""
    root = Path(av.__file__).parent
    stubs = {"open": root / "container" / "core.pyi", "reformat": root / "video" / "reformatter.pyi"}
    source = Path(__file__).parent.parent
    known = {
        name: {
            argument.arg
            for node in ast.walk(ast.parse(stub.read_text()))
            if isinstance(node, ast.FunctionDef) and node.name == name
            for argument in (*node.args.args, *node.args.kwonlyargs)
        }
        for name, stub in stubs.items()
    }
    used: dict[str, set[str]] = {name: set() for name in stubs}
    for path in [*(source / "src").rglob("*.py"), *(source / "soak").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or node.func.attr not in stubs:
                continue
            if node.func.attr == "reformat" or getattr(node.func.value, "id", "") == "av":
                used[node.func.attr] |= {keyword.arg for keyword in node.keywords if keyword.arg}
    used["open"] |= LENIENT_METADATA.keys()
    assert used["open"] >= {"options"}
    assert used["reformat"] >= {"interpolation", "threads"}
    assert {name: used[name] - known[name] for name in used} == {"open": set(), "reformat": set()}


def test_the_declared_versions_of_pyav_are_those_whose_calls_were_tried() -> None:
    """A new major took arguments away and changed what iterating over side data gives."""
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    (declared,) = [name for name in project["dependencies"] if name.startswith("av")]
    assert declared == "av>=17.1,<20"
    assert 17 <= int(av.__version__.partition(".")[0]) < 20


# -------------------------------------------------------------------------------------------------------------- faults


def outcome(path: Path) -> int | str:
    """Number of frames decoded, or the reason code."""
    try:
        return len(decode(video_ref(path), 16, max_frames=100))
    except VideoError as error:
        return error.reason


def make_faults(folder: Path, square: Path) -> dict[str, str]:
    """Broken files by name, with the reason each must be refused for."""
    data = square.read_bytes()
    (folder / "text.mp4").write_text("this is a text file\n" * 50)
    (folder / "zero.mp4").write_bytes(b"")
    (folder / "noise.webm").write_bytes(np.random.default_rng(0).bytes(5000))
    (folder / "headless.mp4").write_bytes(data[: len(data) * 2 // 3])  # the index is at the end
    (folder / "playlist.mp4").write_text(f"#EXTM3U\n#EXTINF:1,\n{square}\n#EXT-X-ENDLIST\n")
    (folder / "concat.mp4").write_text(f"ffconcat version 1.0\nfile {square}\n")
    (folder / "folder.mp4").mkdir()
    (folder / "broken_link.mp4").symlink_to(folder / "nowhere.mp4")
    os.mkfifo(folder / "pipe.mp4")
    encode_sound(folder / "sound.mp4")
    encode(folder / "tiny.mp4", moving_square(3, 2, 2))
    encode(folder / "one.gif", np.zeros((3, 1, 1, 3), np.uint8))
    return {
        "text.mp4": "unreadable",
        "zero.mp4": "unreadable",
        "noise.webm": "unreadable",
        "headless.mp4": "unreadable",
        "playlist.mp4": "unreadable",
        "concat.mp4": "unreadable",
        "folder.mp4": "unreadable",
        "broken_link.mp4": "unreadable",
        "pipe.mp4": "unreadable",
        "sound.mp4": "no_video_stream",
        "tiny.mp4": "too_small",
        "one.gif": "too_small",
    }


def test_faults_have_reasons_and_make_no_noise(square: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    wanted = make_faults(tmp_path, square)
    assert {name: reason_of(tmp_path / name).reason for name in wanted} == wanted
    for name, reason in wanted.items():
        with pytest.raises(VideoError) as caught:
            probe(video_ref(tmp_path / name))
        assert caught.value.reason == reason, name
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm", ".avi", ".gif"])
def test_a_cut_file_is_never_taken_for_a_shorter_video(tmp_path: Path, suffix: str, capfd: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    video = np.repeat(np.repeat(rng.integers(0, 255, (T, 12, 16, 3), np.uint8), 4, 1), 4, 2)
    whole = encode(tmp_path / f"whole{suffix}", video, muxer={"movflags": "faststart"} if suffix == ".mp4" else None)
    data = whole.read_bytes()
    results = []
    for percent in (3, 20, 50, 70, 90, 97, 99):
        cut = tmp_path / f"cut{suffix}"
        cut.write_bytes(data[: len(data) * percent // 100])
        results.append(outcome(cut))
    assert set(results) <= {"truncated", "unreadable", T}
    assert results.count("truncated") >= 3
    assert outcome(whole) == T
    assert capfd.readouterr() == ("", "")


def test_damage_inside_a_file_is_noticed(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    video = np.repeat(np.repeat(rng.integers(0, 255, (T, 12, 16, 3), np.uint8), 4, 1), 4, 2)
    path = encode(tmp_path / "whole.mkv", video)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    # Several frames with their headers: H.264 has no checksum, so that noise inside one frame can, rarely, be a valid one.
    data[middle : middle + 4000] = rng.bytes(4000)
    path.write_bytes(data)
    assert reason_of(path).reason == "truncated"
    # What lies before the damage can be had.
    assert len(decode(video_ref(path), 16, max_frames=5)) == 5


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_damage_gives_frames_or_a_video_error(square: Path, tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(square.read_bytes())
    for position in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=8)):
        content[position] ^= data.draw(st.integers(1, 255))
    path = tmp_path / "damaged.mp4"
    path.write_bytes(content)
    known = ("truncated", "unreadable", "no_video_stream", "too_small", "too_large", "too_short", "odd_rotation")
    assert isinstance(result := outcome(path), int) or result in known


def test_edit_lists_are_not_taken_for_truncation(tmp_path: Path) -> None:
    """The track promises 30 samples, of which an edit list shows the last 20: what cutting without encoding gives."""
    source = encode(tmp_path / "source.mp4", moving_square(T), options={"g": "5", "bf": "0"})
    cut = remux(source, tmp_path / "cut.mp4", shift=-10 * 1024)
    with av.open(str(cut)) as container:
        assert container.streams.video[0].frames == T
    np.testing.assert_array_equal(decode(video_ref(cut), 16), decode(video_ref(source), 16)[10:])
    assert probe(video_ref(cut)).frames == 20


def test_same_stream_in_another_container_decodes_equally(square: Path, tmp_path: Path) -> None:
    other = remux(square, tmp_path / "square.mkv")
    np.testing.assert_array_equal(decode(video_ref(other), 32), decode(video_ref(square), 32))


# ------------------------------------------------------------------------------------------------------- frame folders


def test_frame_folders_are_read_in_order_of_numbers(tmp_path: Path) -> None:
    video = moving_square(12)
    folder = save_pictures(tmp_path / "frames", video, "f{}.png")  # f10 comes after f9
    np.testing.assert_array_equal(decode(video_ref(folder), None), video)
    info = probe(video_ref(folder))
    assert (info.frames, info.width, info.height, info.fps, info.codec) == (12, 64, 48, None, "png")
    small = decode(video_ref(folder), 24)
    assert small.shape == (12, 24, 24, 3)
    assert np.abs(small[:, 14:, 14:].mean((0, 1, 2)) - (0, 0, 255)).max() < 2
    np.testing.assert_array_equal(decode(video_ref(folder), 24, start=1, stride=3, max_frames=2), small[1:7:3])


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_cut_pictures_are_refused(tmp_path: Path, suffix: str, capfd: pytest.CaptureFixture[str]) -> None:
    folder = save_pictures(tmp_path / "frames", moving_square(5), "{:03d}." + suffix)
    third = folder / f"003.{suffix}"
    third.write_bytes(third.read_bytes()[:-60])
    error = reason_of(folder)
    assert error.reason == "truncated"
    assert third.name in error.detail
    (folder / f"001.{suffix}").write_text("no picture")
    assert reason_of(folder).reason == "unreadable"
    assert capfd.readouterr() == ("", "")


def test_two_series_in_one_folder_are_not_mixed(tmp_path: Path) -> None:
    save_pictures(tmp_path / "frames", moving_square(3), "rgb_{}.png")
    save_pictures(tmp_path / "frames", moving_square(3), "depth_{}.png")
    assert reason_of(tmp_path / "frames").reason == "mixed_frames"


@pytest.mark.parametrize("size", [None, 32, 64])
def test_pictures_of_several_sizes_are_not_squashed_into_one(tmp_path: Path, size: int | None) -> None:
    folder = save_pictures(tmp_path / "frames", moving_square(2), "{}.png")
    save_pictures(folder, moving_square(2, 128, 96), "{}.png", first=3)
    error = reason_of(folder, size=size)
    assert error.reason == "mixed_sizes"
    assert "3.png has 128x96 pixels, the pictures before it 64x48" in error.detail
    assert len(decode(video_ref(folder), size, max_frames=2)) == 2


def test_pictures_that_are_too_small_are_refused(tmp_path: Path) -> None:
    save_pictures(tmp_path / "tiny", moving_square(2, 15, 40), "{}.png")
    assert reason_of(tmp_path / "tiny").reason == "too_small"
