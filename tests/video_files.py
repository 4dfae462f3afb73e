"""Little videos for the tests, made on the spot, and ways to break them."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
from numpy.typing import NDArray

CODECS = {
    ".mp4": "libx264",
    ".mov": "libx264",
    ".mkv": "libx264",
    ".webm": "libvpx-vp9",
    ".avi": "mpeg4",
    ".gif": "gif",
    **dict.fromkeys((".m4v", ".3gp", ".ts", ".mts", ".m2ts"), "libx264"),
    **dict.fromkeys((".mpg", ".mpeg", ".vob"), "mpeg2video"),
    ".wmv": "wmv2",
    ".flv": "flv",
    ".ogv": "libvpx",
    ".mjpeg": "mjpeg",
}


def moving_square(frames: int = 30, width: int = 64, height: int = 48, seed: int = 0) -> NDArray[np.uint8]:
    """(T, H, W, 3): a red square walks right along the top, the bottom right quarter is blue; `seed` shifts it."""
    video = np.zeros((frames, height, width, 3), np.uint8)
    video[:, height // 2 :, width // 2 :] = (0, 0, 255)
    side = height // 3
    for t in range(frames):
        left = (t + 7 * seed) % (width - side)
        video[t, 2 : 2 + side, left : left + side] = (255, 0, 0)
    return video


def encode(
    path: Path,
    frames: NDArray[np.uint8],
    *,
    codec: str | None = None,
    pix_fmt: str | None = None,
    times: list[int] | None = None,
    muxer: dict[str, str] | None = None,
    pixel_aspect: Fraction | None = None,
    options: dict[str, str] | None = None,
) -> Path:
    """Encode by suffix of `path`; `times` are the frames' times in tenths of a second."""
    codec = codec or CODECS[path.suffix.lower()]
    kind = {".mts": "mpegts", ".ogv": "ogg"}.get(path.suffix.lower())
    with av.open(str(path), "w", format=kind, options=muxer or {}) as container:
        stream = container.add_stream(codec, rate=25 if codec == "mpeg2video" else 10, options=options or {})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pix_fmt or {"gif": "rgb8", "mjpeg": "yuvj420p"}.get(codec, "yuv420p")
        stream.codec_context.thread_count = 1
        if pixel_aspect is not None:
            stream.codec_context.sample_aspect_ratio = pixel_aspect
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 10)
        for number, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            if times is not None:
                picture.pts, picture.time_base = times[number], Fraction(1, 10)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return path


def encode_sound(path: Path) -> Path:
    """A file with a sound stream and no pictures."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        for number in range(4):
            sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            sound.sample_rate, sound.pts = 16000, 1024 * number
            container.mux(stream.encode(sound))
        container.mux(stream.encode(None))
    return path


def set_display_matrix(source: Path, target: Path, a: int, b: int, c: int, d: int) -> Path:
    """Copy an mp4 with another display matrix: by QuickTime's rule a point (x, y) is shown at (ax + cy, bx + dy)."""
    data = bytearray(source.read_bytes())
    start = data.index(b"tkhd") + 4 + 40
    data[start : start + 36] = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    target.write_bytes(data)
    return target


def remux(source: Path, target: Path, shift: int = 0) -> Path:
    """The same packets in another container, with times shifted by so many ticks."""
    with av.open(str(source)) as read, av.open(str(target), "w") as write:
        stream = write.add_stream_from_template(read.streams.video[0])
        for packet in read.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
                write.mux(packet)
    return target


def save_pictures(folder: Path, frames: NDArray[np.uint8], name: str = "{:06d}.jpg", first: int = 1) -> Path:
    """A frame folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, frame in enumerate(frames, first):
        assert cv2.imwrite(str(folder / name.format(number)), frame[..., ::-1])
    return folder
