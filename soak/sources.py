"""The undamaged clips from which a fuzz corpus is made, in many containers and codecs, and digests of their frames."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
from numpy.typing import NDArray

from localmotion.errors import LocalmotionError, VideoError
from localmotion.video import decode, video_ref
from localmotion.video.listing import usable_videos

SIDE, FRAMES = 96, 24
"""Longer side of the sources in pixels, and their length.

They are small, so that thousands of files are fast to make.
"""


@dataclass(frozen=True)
class Format:
    """A container and codec for encoding a source, and the family of its undamaged files."""

    name: str
    suffix: str
    codec: str
    pix_fmt: str
    muxer: tuple[tuple[str, str], ...] = ()
    options: tuple[tuple[str, str], ...] = ()
    family: str = "control"
    exact: bool = False
    """Whether the codec is lossless. Decoded frames must then equal the encoded ones bit for bit."""


_X264 = (("preset", "ultrafast"), ("g", "8"))
_X265 = (("preset", "ultrafast"), ("x265-params", "log-level=none:pools=1:frame-threads=1"))
_VPX = (("deadline", "realtime"), ("cpu-used", "8"))
FORMATS = (
    Format("h264", ".mp4", "libx264", "yuv420p", options=_X264),
    Format("h264_fast", ".mp4", "libx264", "yuv420p", (("movflags", "faststart"),), _X264),
    Format("h264_fragments", ".mp4", "libx264", "yuv420p", (("movflags", "frag_keyframe+empty_moov"),), _X264),
    Format("h264", ".mov", "libx264", "yuv420p", options=(("preset", "veryfast"), ("g", "12"), ("bf", "2"))),
    Format("h264", ".mkv", "libx264", "yuv420p", options=_X264),
    Format("h265", ".mkv", "libx265", "yuv420p", options=_X265),
    Format("av1", ".mkv", "libsvtav1", "yuv420p", options=(("preset", "12"), ("svtav1-params", "lp=1"))),
    Format("vp9", ".webm", "libvpx-vp9", "yuv420p", options=_VPX),
    Format("vp8", ".webm", "libvpx", "yuv420p", options=_VPX),
    Format("mpeg4", ".mp4", "mpeg4", "yuv420p"),
    Format("mpeg4", ".avi", "mpeg4", "yuv420p"),
    Format("msmpeg4", ".avi", "msmpeg4v2", "yuv420p"),
    Format("mjpeg", ".avi", "mjpeg", "yuvj420p"),
    Format("mpeg2", ".mkv", "mpeg2video", "yuv420p"),
    Format("gif", ".gif", "gif", "rgb8"),
    Format("ffv1", ".mkv", "ffv1", "bgr0", exact=True),
    Format("png", ".mov", "png", "rgb24", exact=True),
    Format("h264_10bit", ".mp4", "libx264", "yuv420p10le", options=_X264, family="deep_colour"),
    Format("h264_444_10bit", ".mkv", "libx264", "yuv444p10le", options=_X264, family="deep_colour"),
    Format("h265_12bit", ".mkv", "libx265", "yuv420p12le", options=_X265, family="deep_colour"),
    Format("prores", ".mov", "prores_ks", "yuv422p10le", family="deep_colour"),
    Format("png_16bit", ".mov", "png", "rgb48be", family="deep_colour"),
    Format("ffv1_16bit", ".mkv", "ffv1", "yuv420p16le", family="deep_colour"),
    Format("vp9_alpha", ".webm", "libvpx-vp9", "yuva420p", options=_VPX, family="deep_colour"),
    Format("gif_grey", ".gif", "gif", "gray", family="palette"),
    Format("rle", ".mov", "qtrle", "rgb24", family="palette"),
    Format("video1", ".avi", "msvideo1", "rgb555le", family="palette"),
    Format("cinepak", ".avi", "cinepak", "rgb24", family="palette"),
)


@dataclass(frozen=True)
class Source:
    """One undamaged file. `digest`: digest of its frames at the extracted size."""

    key: str
    path: Path
    family: str
    digest: str


def rendered(number: int, seed: int) -> NDArray[np.uint8]:
    """(FRAMES, H, W, 3): a textured patch moves over a drifting texture. Sizes and speeds depend on `number`."""
    rng = np.random.default_rng([seed, number])
    width, height = ((96, 64), (64, 96), (80, 80), (96, 54), (72, 96))[number % 5]
    ground, patch = (
        cv2.GaussianBlur(rng.integers(0, 256, (side, side, 3)).astype(np.float32), (0, 0), 2.0) for side in (128, 128)
    )
    ground, patch = (np.clip((x - x.mean()) * 4 + 128, 0, 255).astype(np.uint8) for x in (ground, patch))
    velocity, drift = rng.uniform(1, 3, 2), rng.integers(-2, 3, 2)
    video = np.empty((FRAMES, height, width, 3), np.uint8)
    for t in range(FRAMES):
        video[t] = np.roll(ground, t * drift, (0, 1))[:height, :width]
        y, x = (velocity * t).astype(int) % (height - 24, width - 24)
        video[t, y : y + 24, x : x + 24] = patch[:24, :24]
    return video


def real(folder: Path, count: int, seed: int) -> Iterator[tuple[Path, NDArray[np.uint8]]]:
    """Files of `folder`, drawn with `seed`, with their first frames scaled down: (path, (FRAMES, h, w, 3))."""
    refs = [ref for ref in usable_videos(folder) if ref.kind == "file"]
    found = 0
    for number in np.random.default_rng(seed).permutation(len(refs)):
        try:
            frames = decode(refs[number], None, max_frames=FRAMES)
        except VideoError:
            continue  # a user's folder may hold broken files: take another one
        if len(frames) < FRAMES:
            continue
        scale = SIDE / max(frames.shape[1:3])
        side = tuple(max(16, 2 * round(scale * n / 2)) for n in frames.shape[2:0:-1])
        yield refs[number].path, np.stack([cv2.resize(frame, side, interpolation=cv2.INTER_AREA) for frame in frames])
        found += 1
        if found == count:
            return
    raise LocalmotionError(
        f"{folder}: has {found} videos of {FRAMES} frames, {count} are needed; leave --videos out to render them"
    )


@contextlib.contextmanager
def usual_scheduling() -> Iterator[None]:
    """Context at whose end all threads of this process get the usual scheduling.

    If SVT-AV1 runs as root, it sets the thread that opens its encoder to the highest real-time priority and does not
    reset it. Threads of torch inherit this priority. While they wait for each other, no other process gets the cores.
    """
    try:
        yield
    finally:
        if hasattr(os, "sched_setscheduler"):
            for thread in os.listdir("/proc/self/task"):
                with contextlib.suppress(ProcessLookupError):  # the thread has ended
                    os.sched_setscheduler(int(thread), os.SCHED_OTHER, os.sched_param(0))


@usual_scheduling()
def encode(path: Path, frames: NDArray[np.uint8], form: Format, times: list[int] | None = None) -> Path:
    """Encode (T, H, W, 3) uint8. `times`: times of the frames in 1/30 s. Raises av's errors if the codec is missing."""
    with av.open(str(path), "w", options={**dict(form.muxer), "fflags": "+bitexact"}) as container:
        stream: Any = container.add_stream(form.codec, rate=30, options=dict(form.options))
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], form.pix_fmt
        stream.codec_context.thread_count = 1
        for number, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            if times is not None:
                picture.pts, picture.time_base = times[number], Fraction(1, 30)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return path


def encode_sound(path: Path, codec: str, rate: int = 48000) -> Path:
    """Encode one second of sound without pictures."""
    with av.open(str(path), "w", options={"fflags": "+bitexact"}) as container:
        stream: Any = container.add_stream(codec, rate=rate, layout="mono")
        form, size = stream.codec_context.format.name, stream.codec_context.frame_size or 960
        tone = np.sin(np.arange(rate) * 0.05)
        for start in range(0, rate - size, size):
            block = tone[None, start : start + size]
            values = (block * 20000).astype(np.int16) if form.startswith("s16") else block.astype(np.float32)
            sound = av.AudioFrame.from_ndarray(values, format=form, layout="mono")
            sound.sample_rate, sound.pts = rate, start
            container.mux(stream.encode(sound))
        container.mux(stream.encode(None))
    return path


def digest(frames: NDArray[np.uint8]) -> str:
    return hashlib.sha256(f"{frames.shape}".encode() + np.ascontiguousarray(frames).tobytes()).hexdigest()[:32]


def make_sources(folder: Path, seed: int, size: int, videos: Path | None = None, clips: int = 4) -> list[Source]:
    """Write every source in every format that this FFmpeg can encode, and copy a few real files.

    Raises LocalmotionError if a file does not decode to the frames that were encoded, because the corpus would then be
    useless.
    """
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("SVT_LOG", "1")  # otherwise the AV1 encoder prints its settings
    if videos is None:
        pictures = [rendered(number, seed) for number in range(clips)]
        originals: list[Path] = []
    else:
        both = list(real(videos, clips, seed))
        pictures, originals = [frames for _, frames in both], [path for path, _ in both if path.stat().st_size < 200_000]
    found: list[Source] = []
    for number, frames in enumerate(pictures):
        for form in FORMATS:
            if form.codec not in av.codecs_available:
                continue
            path = folder / f"{number}_{form.name}{form.suffix}"
            try:
                encode(path, frames, form)
            except av.error.FFmpegError:  # this build has no such encoder, or not for this pixel format
                path.unlink(missing_ok=True)
                continue
            native = decode(video_ref(path), None)
            error = np.abs(native.astype(int) - frames).mean() if native.shape == frames.shape else np.inf
            lossy = {"gif_grey": 80, "gif": 40}.get(form.name, 25)
            if error > (0 if form.exact else lossy):
                raise LocalmotionError(f"{path}: decodes to other pictures than were encoded (mean difference {error:.1f})")
            found.append(Source(path.name, path, form.family, digest(decode(video_ref(path), size))))
    for number, original in enumerate(originals):
        path = folder / f"original_{number}{original.suffix.lower()}"
        path.write_bytes(original.read_bytes())
        found.append(Source(path.name, path, "control", digest(decode(video_ref(path), size))))
    return found
