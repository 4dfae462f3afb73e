"""Colours of decoded frames against exact arithmetic: chroma, matrices and ranges, HDR."""

from __future__ import annotations

from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from localmotion.video import decode, probe, video_ref, write_video
from localmotion.video.colour import BACKDROP, Converter, tone_mapped
from localmotion.video.scan import scan
from video_files import encode


def blocks(frames: int, height: int, width: int, side: int, blur: int = 0) -> NDArray[np.uint8]:
    """(T, H, W, 3): squares of random colours that walk to the left, a pixel a frame; edges blurred by so many pixels."""
    rng = np.random.default_rng(0)
    colours = rng.integers(40, 216, (height // side + 1, (width + frames) // side + 1, 3), np.uint8)
    wall = colours.repeat(side, 0).repeat(side, 1)
    wall = cv2.GaussianBlur(wall, (0, 0), blur) if blur else wall
    return np.stack([wall[:height, t : t + width] for t in range(frames)])


def averaged(frames: NDArray[np.floating], side: int) -> NDArray[np.float32]:
    return np.stack([cv2.resize(x.astype(np.float32), (side, side), interpolation=cv2.INTER_AREA) for x in frames])


def exact(path: Path, *, shift: float) -> NDArray[np.float32]:
    """RGB of a yuv420p video of limited range and the matrix of BT.601, at full size by the formulas; ``shift`` says by how many
    pixels chroma lies left of the middle of the two columns that share it."""
    frames = []
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            y, u, v = (
                np.frombuffer(p, np.uint8).reshape(p.height, p.line_size)[:, : p.width].astype(np.float32) for p in frame.planes
            )
            where = np.array([[0.5, 0, shift / 2 - 0.25], [0, 0.5, -0.25]], np.float32)
            flags, border = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, cv2.BORDER_REPLICATE
            u, v = (cv2.warpAffine(c, where, y.shape[::-1], flags=flags, borderMode=border) - 128 for c in (u, v))
            y, u, v = (y - 16) * 255 / 219, u * 255 / 224, v * 255 / 224
            frames.append(np.stack([y + 1.402 * v, y - 0.344136 * u - 0.714136 * v, y + 1.772 * u], -1).clip(0, 255))
    return np.stack(frames)


@pytest.mark.parametrize(("height", "width", "block", "blur"), [(180, 320, 20, 3), (480, 640, 32, 0)])
def test_colours_are_those_of_the_full_picture_averaged(tmp_path: Path, height: int, width: int, block: int, blur: int) -> None:
    path = encode(tmp_path / "blocks.mp4", blocks(3, height, width, block, blur), options={"crf": "4"})
    full = exact(path, shift=0.5)  # H.264 says: left, where a file does not say otherwise
    for side in (64, 128):
        want = averaged(full, side)
        have = decode(video_ref(path), side)
        assert np.abs(have - want).mean() <= 0.6
        assert np.abs((have - want).mean((0, 1, 2))).max() < 0.1  # no colour is brighter or darker on the whole
        assert np.abs(decode(video_ref(path), side, legacy=True) - want).mean() > 2


def test_a_film_that_we_write_comes_back_in_its_own_colours(tmp_path: Path) -> None:
    """So that clips of rendered films and pictures straight from an environment agree."""
    film = blocks(4, 128, 128, 32, 2)
    write_video(tmp_path / "film.mp4", film, 10, crf=2)
    ref = video_ref(tmp_path / "film.mp4")
    want = averaged(film, 64)
    assert np.abs(decode(ref, 64) - averaged(exact(tmp_path / "film.mp4", shift=0), 64)).mean() <= 0.6
    assert np.abs(decode(ref, 64) - want).mean() <= 0.6
    assert np.abs(decode(ref, 64, legacy=True) - want).mean() > 1.2
    assert np.abs((decode(ref, None) - film.astype(float)).mean((0, 1, 2))).max() < 0.3


@pytest.mark.parametrize("matrix", ["bt709", "smpte170m", "bt2020nc"])
@pytest.mark.parametrize("span", ["tv", "pc"])
def test_matrix_and_range_are_those_of_the_file(tmp_path: Path, matrix: str, span: str) -> None:
    red, blue = {"bt709": (0.2126, 0.0722), "smpte170m": (0.299, 0.114), "bt2020nc": (0.2627, 0.0593)}[matrix]
    colour = np.array([200.0, 90, 40])
    luma = colour @ [red, 1 - red - blue, blue]
    chroma = (colour[2] - luma) / (2 - 2 * blue), (colour[0] - luma) / (2 - 2 * red)
    codes = (
        [luma, *(c + 128 for c in chroma)] if span == "pc" else [16 + luma * 219 / 255, *(128 + c * 224 / 255 for c in chroma)]
    )
    path = tmp_path / "flat.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "1", "colorspace": matrix, "color_range": span})
        stream.height = stream.width = 64
        stream.pix_fmt = "yuv420p"
        for _ in range(2):
            planes = [np.full((64 if n == 0 else 32, 64 if n == 0 else 32), round(c), np.uint8) for n, c in enumerate(codes)]
            frame = av.VideoFrame.from_ndarray(np.concatenate([p.reshape(-1, 64) for p in planes]), format="yuv420p")
            frame.colorspace = {"bt709": 1, "smpte170m": 6, "bt2020nc": 9}[matrix]
            frame.color_range = 2 if span == "pc" else 1
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    for size in (None, 32):
        assert np.abs(decode(video_ref(path), size) - colour).max() <= 2.5


def test_recipes_of_before_get_the_frames_of_before(tmp_path: Path) -> None:
    path = encode(tmp_path / "blocks.mp4", blocks(3, 120, 160, 16))
    with av.open(str(path)) as container:
        old = [
            VideoReformatter().reformat(f, 64, 64, "rgb24", interpolation="AREA", threads=1) for f in container.decode(video=0)
        ]
    np.testing.assert_array_equal(decode(video_ref(path), 64, legacy=True), np.stack([f.to_ndarray() for f in old]))


# ----------------------------------------------------------------------------------------------------------------- HDR


def light_of(video: NDArray[np.uint8]) -> NDArray[np.floating]:
    """Light of pictures of standard range on a display: cd/m², in the colours of BT.2020, with white at 203."""
    wide = np.linalg.inv([[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]])
    return 203 * np.maximum((video / 255) ** 2.4 @ wide.T, 0)


def signal_of(light: NDArray[np.floating], transfer: str) -> NDArray[np.uint16]:
    """Codes 0..65535 of light in cd/m², by ITU-R BT.2100."""
    if transfer == "pq":
        power = (light / 10000) ** (2610 / 16384)
        signal = ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** (2523 / 32)
    else:
        luma = np.maximum(light / 1000 @ [0.2627, 0.6780, 0.0593], 1e-9)[..., None]
        scene = light / 1000 * luma ** (1 / 1.2 - 1)
        bright = 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
        signal = np.where(scene <= 1 / 12, np.sqrt(3 * scene), bright)
    return (65535 * signal.clip(0, 1)).round().astype(np.uint16)


def encode_hdr(path: Path, codes: NDArray[np.uint16], transfer: str) -> Path:
    """(T, H, W, 3) codes 0..65535 as 10-bit H.264 with the matrix of BT.2020; its arithmetic is here, as PyAV's depends on the version."""
    tags = {
        "color_trc": {"pq": "smpte2084", "hlg": "arib-std-b67"}[transfer],
        "color_primaries": "bt2020",
        "colorspace": "bt2020nc",
    }
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "4", "color_range": "tv", **tags})
        stream.height, stream.width = codes.shape[1:3]
        stream.pix_fmt = "yuv420p10le"
        for picture in codes / 65535:
            luma = picture @ [0.2627, 0.6780, 0.0593]
            chroma = [(picture[..., 2] - luma) / 1.8814, (picture[..., 0] - luma) / 1.4746]
            halves = [c.reshape(c.shape[0] // 2, 2, c.shape[1] // 2, 2).mean((1, 3)) for c in chroma]
            frame = av.VideoFrame(stream.width, stream.height, "yuv420p10le")
            for plane, values in zip(frame.planes, [64 + 876 * luma, *(512 + 896 * c for c in halves)], strict=True):
                rows = np.zeros((plane.height, plane.line_size // 2), "<u2")
                rows[:, : plane.width] = values.round()
                plane.update(rows.tobytes())
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("transfer", ["pq", "hlg"])
def test_hdr_is_seen_as_standard_range_shows_it(tmp_path: Path, transfer: str) -> None:
    video = blocks(6, 96, 96, 16)
    path = encode_hdr(tmp_path / "hdr.mp4", signal_of(light_of(video), transfer), transfer)
    want = averaged(video, 32)
    have, before = decode(video_ref(path), 32), decode(video_ref(path), 32, legacy=True)
    assert have.dtype == np.uint8
    assert np.abs(have - want).mean() < 3
    assert np.abs(before - want).mean() > 10
    assert have.std() / want.std() == pytest.approx(1, abs=0.06)
    assert before.std() / want.std() < 0.85
    info = probe(video_ref(path))
    assert (info.hdr, info.bits, info.interlaced) == (transfer, 10, False)
    (report,) = scan(tmp_path, min_frames=2, workers=0).videos
    assert "hdr: " + transfer.upper() in " ".join(report.warnings)


@pytest.mark.parametrize("transfer", ["pq", "hlg"])
def test_bright_light_is_compressed_and_never_cut(transfer: str) -> None:
    grey = np.geomspace(0.1, 1000, 200)
    codes = signal_of(np.repeat(grey[None, :, None], 3, 2), transfer)
    shown = tone_mapped(codes, transfer, wide=False)[0].astype(int)
    assert np.ptp(shown, axis=1).max() <= 1  # grey stays grey
    assert (np.diff(shown[:, 1]) >= 0).all()
    below = grey < 0.8 * 203
    np.testing.assert_allclose(shown[below, 1], 255 * (grey[below] / 203) ** (1 / 2.4), atol=1.5)
    white = shown[np.abs(grey - 203).argmin(), 1]
    assert 240 < white < 252
    assert shown[-1, 1] > white


def test_what_is_drawn_by_transparency_alone_moves(tmp_path: Path) -> None:
    """A white sheet with a hole that walks: its colours never change."""
    frames = np.full((30, 48, 64, 4), 255, np.uint8)
    for t, frame in enumerate(frames):
        frame[10:30, t : t + 20, 3] = 0
    path = tmp_path / "hole.mov"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("png", rate=10, width=64, height=48)
        stream.pix_fmt = "rgba"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgba")))
        container.mux(stream.encode())
    # (T, side, side, 3): the hole shows the grey behind it, the rest stays white.
    have = decode(video_ref(path), 64)
    assert have[0, 30, 10].tolist() == [BACKDROP] * 3
    assert have[0, 60, 10].tolist() == [255] * 3
    assert have[20, 30, 10].tolist() == [255] * 3
    assert decode(video_ref(path), 64, legacy=True).min() == 255
    assert [video.id for video in scan(tmp_path).usable] == ["hole.mov"]


@pytest.mark.parametrize("alpha", [0, 1, 100, 254, 255])
def test_transparency_mixes_with_the_grey_behind(tmp_path: Path, alpha: int) -> None:
    frame = np.zeros((16, 16, 4), np.uint8)
    frame[..., :] = (200, 10, 60, alpha)
    have = Converter(tmp_path).rgb(av.VideoFrame.from_ndarray(frame, format="rgba"), 8, 8)
    want = np.array([200, 10, 60]) * alpha / 255 + BACKDROP * (1 - alpha / 255)
    assert np.abs(have - want).max() <= 0.5


@pytest.mark.parametrize("suffix", [".png", ".webp"])
@pytest.mark.parametrize("colours", [1, 3])
def test_transparent_pictures_of_a_folder_stand_before_the_same_grey(tmp_path: Path, suffix: str, colours: int) -> None:
    pixels = np.full((48, 48, 4), 40, np.uint8)
    pixels[..., 2] = 40 if colours == 1 else 240  # OpenCV's order: blue, green, red, alpha
    pixels[..., 3] = 255
    pixels[:24, :, 3] = 51
    quality = [cv2.IMWRITE_WEBP_QUALITY, 101] if suffix == ".webp" else []  # 101: without loss
    for number in range(2):
        assert cv2.imwrite(str(tmp_path / f"{number}{suffix}"), pixels, quality)
    have = decode(video_ref(tmp_path), 48)[0]
    assert have[40, 5].tolist() == [240 if colours == 3 else 40, 40, 40]
    want = [round(0.2 * c + 0.8 * BACKDROP) for c in (240 if colours == 3 else 40, 40, 40)]
    assert np.abs(have[5, 5].astype(int) - want).max() <= 1
    assert decode(video_ref(tmp_path), 48, legacy=True)[0, 5, 5].tolist() == [240 if colours == 3 else 40, 40, 40]
