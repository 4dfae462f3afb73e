"""Containers without a length of their own, and pictures other than JPEG and PNG: read whole, refused when cut."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from localmotion.errors import VideoError
from localmotion.video import decode, probe, video_ref
from localmotion.video.pictures import bmp_size, tiff_size, webp_size
from property_examples import examples
from video_files import encode, moving_square, save_pictures

T = 12
STREAMS = (".ts", ".mts", ".m2ts", ".mpg", ".vob", ".wmv", ".flv", ".ogv", ".mjpeg")
CODING = {".wmv": {"b": "2000000"}, ".flv": {"b": "2000000"}, ".mpg": {"b": "2000000"}, ".vob": {"b": "2000000"}}


def reason_of(path: Path) -> VideoError:
    with pytest.raises(VideoError) as caught:
        decode(video_ref(path), 32)
    return caught.value


@pytest.mark.parametrize("suffix", [*STREAMS, ".m4v", ".3gp", ".mpeg", ".TS"])
def test_every_container_gives_all_frames(tmp_path: Path, suffix: str) -> None:
    video = moving_square(T, 64, 64)
    path = encode(tmp_path / f"a{suffix.lower()}", video, options=CODING.get(suffix)).rename(tmp_path / f"a{suffix}")
    info = probe(video_ref(path))
    assert (info.frames, info.width, info.height) == (T, 64, 64)
    assert np.abs(decode(video_ref(path), None).astype(int) - video).mean() < 6


@pytest.mark.parametrize("suffix", STREAMS)
def test_streams_that_are_cut_or_end_in_zeros_are_refused(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (T, 64, 64, 3), np.uint8)
    path = encode(tmp_path / f"a{suffix}", noise, options=CODING.get(suffix))
    data = path.read_bytes()
    for share in (0.35, 0.61, 0.87):
        at = int(len(data) * share) // 192 * 192 + 77
        path.write_bytes(data[:at])
        assert reason_of(path).reason in ("truncated", "unreadable"), share
        path.write_bytes(data[:at] + bytes(len(data) - at))
        assert reason_of(path).reason in ("truncated", "unreadable"), share
    path.write_bytes(data[: len(data) // 2] + data[len(data) // 2 + 1000 :])
    assert reason_of(path).reason in ("truncated", "unreadable")
    assert "\n" not in reason_of(path).detail


def test_lost_packets_of_a_transport_stream_are_noticed(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.ts", np.random.default_rng(0).integers(0, 255, (T, 64, 64, 3), np.uint8))
    packets = [path.read_bytes()[at : at + 188] for at in range(0, path.stat().st_size, 188)]
    pictures = [number for number, packet in enumerate(packets) if packet[1:3] == b"\x01\0"]  # inside a picture, of stream 0x100
    for lost in (pictures[1], pictures[len(pictures) // 2], pictures[-2]):
        path.write_bytes(b"".join(packets[:lost] + packets[lost + 1 :]))
        assert reason_of(path).reason == "truncated"


# ----------------------------------------------------------------------------------------------------------- pictures


def picture(suffix: str, image: np.ndarray, *options: int) -> bytes:
    return bytes(cv2.imencode(suffix, image, options)[1])


PICTURES: dict[str, tuple[str, tuple[int, ...]]] = {
    "bmp": (".bmp", ()),
    "tiff": (".tiff", (cv2.IMWRITE_TIFF_COMPRESSION, 1)),
    "tiff, LZW": (".tif", (cv2.IMWRITE_TIFF_COMPRESSION, 5)),
    "tiff, deflate": (".tif", (cv2.IMWRITE_TIFF_COMPRESSION, 8)),
    "webp": (".webp", (cv2.IMWRITE_WEBP_QUALITY, 90)),
    "webp, lossless": (".webp", (cv2.IMWRITE_WEBP_QUALITY, 101)),
}


@pytest.mark.parametrize("name", PICTURES)
def test_other_pictures_are_read_and_cut_ones_refused(tmp_path: Path, name: str) -> None:
    suffix, options = PICTURES[name]
    video = moving_square(3)
    for number, frame in enumerate(video):
        (tmp_path / f"{number}{suffix}").write_bytes(picture(suffix, frame[..., ::-1], *options))
    ref = video_ref(tmp_path)
    assert (probe(ref).frames, probe(ref).width, probe(ref).height) == (3, 64, 48)
    assert np.abs(decode(ref, None).astype(int) - video).mean() < 5
    whole = (tmp_path / f"2{suffix}").read_bytes()
    for at in (1, 40, len(whole) // 2, len(whole) - 1):
        (tmp_path / f"2{suffix}").write_bytes(whole[:at])
        assert reason_of(tmp_path).reason == "truncated", at
    for other in (".png", ".jpg", *{suffix for suffix, _ in PICTURES.values()} - {suffix, ".tif", ".tiff"}):
        (tmp_path / f"2{suffix}").write_bytes(picture(other, video[2]))
        assert reason_of(tmp_path).reason == "truncated", other


def test_pictures_that_are_several_or_of_other_numbers_are_refused(tmp_path: Path) -> None:
    frame = moving_square(1)[0]
    rle = bytearray(picture(".bmp", frame))
    rle[30] = 1
    pages = bytes(cv2.imencodemulti(".tiff", [frame, frame])[1])
    animation = bytearray(picture(".webp", frame))
    animation[12:16] = b"ANIM"
    contents = {
        "pages.tiff": (pages, "several pictures"),
        "float.tiff": (picture(".tiff", frame.astype(np.float32)), "8 or 16 bits"),
        "rle.bmp": (bytes(rle), "compressed BMP"),
        "moves.webp": (bytes(animation), "animation"),
    }
    for name, (data, told) in contents.items():
        folder = tmp_path / name
        folder.mkdir()
        for number in (1, 2):
            (folder / f"{number}{folder.suffix}").write_bytes(data)
        error = reason_of(folder)
        assert (error.reason, told in error.detail) == ("unreadable", True), error.detail


def test_claimed_sizes_of_other_pictures_are_refused_before_they_are_decoded(tmp_path: Path) -> None:
    folder = save_pictures(tmp_path / "frames", moving_square(2), "{}.webp")
    data = bytearray((folder / "2.webp").read_bytes())
    lossless = picture(".webp", moving_square(1)[0], cv2.IMWRITE_WEBP_QUALITY, 101)
    data = bytearray(lossless)
    data[21:25] = (0x3FFF | 0x3FFF << 14).to_bytes(4, "little")
    (folder / "2.webp").write_bytes(data)
    assert reason_of(folder).reason == "too_large"
    tall = bytearray(picture(".tiff", moving_square(1)[0], cv2.IMWRITE_TIFF_COMPRESSION, 5))
    at = tall.index((257).to_bytes(2, "little") + b"\3\0\1\0\0\0") + 8
    tall[at : at + 2] = b"\xff\xff"
    wide = tall.index((256).to_bytes(2, "little") + b"\3\0\1\0\0\0") + 8
    tall[wide : wide + 2] = b"\xff\xff"
    save_pictures(tmp_path / "tiff", moving_square(2), "{}.tiff")
    (tmp_path / "tiff/2.tiff").write_bytes(tall)
    assert reason_of(tmp_path / "tiff").reason == "too_large"


@examples(150)
@given(st.binary(max_size=200), st.sampled_from([b"", b"BM", b"II*\0\x08\0\0\0", b"MM\0*\0\0\0\x08", b"RIFF\x80\0\0\0WEBP"]))
def test_headers_of_any_bytes_are_read_without_other_errors(noise: bytes, head: bytes) -> None:
    for read in (bmp_size, tiff_size, webp_size):
        try:
            size = read(head + noise)
        except ValueError:
            continue
        assert size is None or all(0 < side < 2**32 for side in size)
