"""Decode a video file or a frame folder to square uint8 RGB frames.

One libswscale converter per clip does colour conversion and resizing in one pass (area averaging, aspect squashed to
the square as IPV 1.1 does), with one thread: the fastest of the ways measured, since clips rather than frames are
what runs in parallel.

Nothing is patched up in silence: a file that ends early or holds damaged frames raises VideoError at that frame. Only
local files in the containers listed in `_FORMATS` are opened, so a playlist renamed to .mp4 cannot make the decoder
read other files or the network.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import av
import cv2
import numpy as np
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from localmotion.errors import VideoError
from localmotion.video.listing import VideoRef, frame_files

MIN_SIDE = 16
"""Sides below this many pixels are refused ("too_small"): no motion can be seen in them."""
MAX_PIXELS = 2**26
"""Frames above this many pixels are refused ("too_large"): twice 8K, beyond which a small file may ask for any amount
of memory."""

_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif"


@dataclass(frozen=True)
class VideoInfo:
    """What a video says about itself; `width` and `height` are as shown, i.e. after `rotation`."""

    frames: int
    """Frames by counting packets (files) or pictures (folders); nothing but the first one is decoded."""
    width: int
    height: int
    fps: float | None
    """Mean frames per second; None when unknown (frame folders)."""
    codec: str
    pix_fmt: str
    rotation: int
    """Degrees, counter-clockwise, by which decoded pictures are turned to be shown: 0, 90, 180 or 270."""
    duration: float | None
    """Seconds; None when unknown."""
    vfr: bool
    """Frame intervals differ by more than a tenth of their median."""
    bits: int
    """Bits per colour component of the stored pictures."""
    pixel_aspect: float
    """Width of a pixel over its height; 1.0 when square or unknown."""


def probe(ref: VideoRef) -> VideoInfo:
    """Read a video's properties without decoding more than its first frame.

    Raises VideoError with reason "unreadable", "no_video_stream", "too_small" or "too_large" (frame folders also
    "mixed_frames").
    """
    if ref.kind == "frames":
        files = frame_files(ref.path)
        height, width = _read_image(files[0], 0, ref).shape[:2]
        _check_size(ref, width, height)
        return VideoInfo(len(files), width, height, None, files[0].suffix[1:].lower(), "rgb24", 0, None, False, 8, 1.0)
    with _open(ref.path) as (container, stream):
        first: Any = None
        times: list[float] = []
        for packet in _packets(ref.path, container, stream):
            if first is None:
                first = next(iter(_decode_packet(ref.path, packet, 0)), None)
            if packet.size and not packet.is_discard:
                times.append(float(packet.pts * packet.time_base) if packet.pts is not None else float("nan"))
        if first is None:
            raise VideoError(ref.path, "unreadable", "no frame could be decoded; the file is damaged or its codec is unknown")
        context = stream.codec_context
        rotation = int(first.rotation) % 360
        width, height = (first.width, first.height) if rotation % 180 == 0 else (first.height, first.width)
        _check_size(ref, width, height)
        known = sorted(time for time in times if time == time)
        gaps = [b - a for a, b in pairwise(known)]
        fps, duration, vfr = None, None, False
        if gaps and known[-1] > known[0]:
            median = sorted(gaps)[len(gaps) // 2]
            # Containers round time stamps to ticks (Matroska: 1 ms), which is no variable frame rate.
            vfr = max(abs(gap - median) for gap in gaps) > max(0.1 * median, 2.5 * float(stream.time_base))
            fps = len(gaps) / (known[-1] - known[0])
            duration = known[-1] - known[0] + median
        bits = max((component.bits for component in first.format.components), default=8)
        aspect = float(stream.sample_aspect_ratio or context.sample_aspect_ratio or 1)
        return VideoInfo(len(times), width, height, fps, context.name, first.format.name, rotation, duration, vfr, bits, aspect)


def iter_frames(
    ref: VideoRef, size: int | None, stride: int = 1, *, start: int = 0, max_frames: int | None = None
) -> Iterator[NDArray[np.uint8]]:
    """Yield frames `start, start + stride, ...` as uint8 RGB (size, size, 3), or (H, W, 3) as shown when `size` is
    None.

    Memory is bounded by a few frames, however long the video. `max_frames` limits the frames yielded; damage behind
    the last one is not looked at. With `size` None every frame has the shape of the first. Raises VideoError as
    `probe` does, and "truncated" at the point where the data end before the container says so, or where a frame
    cannot be decoded whole.
    """
    if stride < 1 or start < 0 or (max_frames is not None and max_frames < 1) or (size is not None and size < 1):
        raise ValueError(f"stride {stride}, start {start}, max_frames {max_frames}, size {size}: out of range")
    source = _folder_frames if ref.kind == "frames" else _file_frames
    yield from source(ref, size, stride, start, max_frames)


def decode(
    ref: VideoRef, size: int | None, *, stride: int = 1, start: int = 0, max_frames: int | None = None
) -> NDArray[np.uint8]:
    """Whole clip as uint8 RGB (T, size, size, 3); `iter_frames` stacked. Raises VideoError, "too_short" when no frame
    is left."""
    frames = list(iter_frames(ref, size, stride, start=start, max_frames=max_frames))
    if not frames:
        raise VideoError(ref.path, "too_short", f"has no frame at or behind frame {start}")
    return np.stack(frames)


# --------------------------------------------------------------------------------------------------------------- files


@contextmanager
def _open(path: Path) -> Iterator[tuple[Any, Any]]:
    """Container and picture stream of a file; libav's own words are kept from stderr by PyAV's default (no log
    level)."""
    if not path.exists():
        raise VideoError(path, "unreadable", "no such file (or a broken link)")
    if not path.is_file():
        raise VideoError(path, "unreadable", "is not a regular file")
    if path.stat().st_size == 0:
        raise VideoError(path, "unreadable", "is empty (0 bytes); copy it again")
    options = {"protocol_whitelist": "file", "format_whitelist": _FORMATS}
    try:
        # An absolute path cannot be taken for a URL. Metadata in an odd encoding is no reason to refuse a video.
        container = av.open(str(path.absolute()), options=options, metadata_errors="replace")
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise VideoError(path, "unreadable", f"is not a readable video ({_words(error)}); copy or encode it again") from error
    with container:
        # Cover art of a sound file is a picture stream of one frame.
        streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
        if not streams and container.streams.audio:
            raise VideoError(path, "no_video_stream", "holds sound but no pictures")
        if not streams:
            raise VideoError(path, "unreadable", "holds no pictures; the file is truncated or not a video")
        stream = streams[0]
        if stream.codec_context is None:
            raise VideoError(path, "unreadable", "this build of FFmpeg has no decoder for it; encode it again as H.264")
        stream.codec_context.thread_count = 1
        if stream.codec_context.width * stream.codec_context.height > MAX_PIXELS:
            width, height = stream.codec_context.width, stream.codec_context.height
            raise VideoError(path, "too_large", f"frames of {width}x{height} pixels are beyond {MAX_PIXELS} pixels")
        yield container, stream


def _packets(path: Path, container: Any, stream: Any) -> Iterator[Any]:
    """Packets of the stream, the closing empty one included. Raises VideoError "truncated" when the container
    breaks."""
    count = 0
    demuxer = container.demux(stream)
    while True:
        try:
            packet = next(demuxer)
        except StopIteration:
            return
        except (av.error.FFmpegError, OSError) as error:
            raise VideoError(path, "truncated", f"data break off behind {count} packets ({_words(error)})") from error
        count += 1
        yield packet


def _decode_packet(path: Path, packet: Any, done: int) -> list[Any]:
    try:
        frames = packet.decode()
    except av.error.EOFError:
        return []
    except (av.error.FFmpegError, OSError, ValueError) as error:
        reason = "truncated" if done else "unreadable"
        raise VideoError(path, reason, f"cannot be decoded behind frame {done} ({_words(error)})") from error
    return list(frames)


def _file_frames(ref: VideoRef, size: int | None, stride: int, start: int, max_frames: int | None) -> Iterator[NDArray[np.uint8]]:
    reformatter = VideoReformatter()
    done = yielded = packets = turns = 0
    shape: tuple[int, int] = (size or 0, size or 0)
    with _open(ref.path) as (container, stream):
        for packet in _packets(ref.path, container, stream):
            if packet.size or packet.dts is not None:
                packets += 1
            for frame in _decode_packet(ref.path, packet, done):
                if frame.is_corrupt:
                    raise VideoError(ref.path, "truncated", f"frame {done} is damaged")
                if done == 0:
                    turns = int(frame.rotation) % 360 // 90
                    _check_size(ref, frame.width, frame.height)
                    shape = shape if size else (frame.width, frame.height)
                if done >= start and (done - start) % stride == 0:
                    pixels = _pixels(ref.path, reformatter, frame, shape)
                    yield np.ascontiguousarray(np.rot90(pixels, turns)) if turns else pixels
                    yielded += 1
                    if yielded == max_frames:
                        return
                done += 1
        if done == 0:
            raise VideoError(ref.path, "unreadable", "no frame could be decoded; the file is damaged or its codec is unknown")
        _check_complete(ref.path, container, stream, packets)


def _pixels(path: Path, reformatter: VideoReformatter, frame: Any, shape: tuple[int, int]) -> NDArray[np.uint8]:
    """One decoded frame as RGB of `shape` (width, height)."""
    try:
        small = reformatter.reformat(frame, *shape, "rgb24", interpolation="AREA", threads=1)
    except (av.error.FFmpegError, OSError, ValueError) as error:
        detail = f"pictures of format {frame.format.name} cannot be converted to RGB ({_words(error)})"
        raise VideoError(path, "unreadable", detail) from error
    return np.asarray(small.to_ndarray(), np.uint8)


def _check_complete(path: Path, container: Any, stream: Any, packets: int) -> None:
    """Raise "truncated" when the data end before what the container promises: decoders do not mind an early end."""
    kind = container.format.name
    if "mov" in kind:
        # The index, not stream.frames: an edit list may leave samples out on purpose.
        expected = len(stream.index_entries)
        if packets < expected:
            raise VideoError(path, "truncated", f"data end behind {packets} of {expected} frames")
        return
    size = path.stat().st_size
    with path.open("rb") as file:
        if kind == "gif":
            file.seek(max(0, size - 16))
            if not file.read().rstrip(b"\0\r\n ").endswith(b"\x3b"):  # every GIF closes with this byte
                raise VideoError(path, "truncated", f"ends without its closing byte behind frame {packets}")
            return
        head = file.read(4096)
    promised = _riff_end(head) if head[:4] == b"RIFF" else _matroska_end(head)
    if promised is not None and size < promised:
        raise VideoError(path, "truncated", f"has {size} of {promised} bytes, data end behind {packets} frames")


def _riff_end(head: bytes) -> int | None:
    """Size that an AVI file says it has (its first gigabytes, where it has several parts); None when left open."""
    return int.from_bytes(head[4:8], "little") + 8 if any(head[4:8]) else None


def _matroska_end(head: bytes) -> int | None:
    """Where the segment of a Matroska or WebM file ends by its own account (RFC 8794); None when left open."""

    def number(at: int) -> tuple[int | None, int]:
        """The variable-size integer at `at` and where it ends: as many leading zero bits as further bytes."""
        width = 9 - head[at].bit_length() if at < len(head) else 9
        raw = int.from_bytes(head[at : at + width], "big") & ((1 << 7 * width) - 1)
        return (None if width > 8 or raw == (1 << 7 * width) - 1 else raw), at + width

    if head[:4] != b"\x1a\x45\xdf\xa3":
        return None
    size, at = number(4)
    if size is None or head[at + size : at + size + 4] != b"\x18\x53\x80\x67":
        return None
    length, start = number(at + size + 4)
    return None if length is None else start + length


def _words(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or error).split("\n")[0]


# ------------------------------------------------------------------------------------------------------- frame folders


def _folder_frames(
    ref: VideoRef, size: int | None, stride: int, start: int, max_frames: int | None
) -> Iterator[NDArray[np.uint8]]:
    files = frame_files(ref.path)[start::stride][:max_frames]
    shape: tuple[int, int] | None = (size, size) if size else None
    for number, file in enumerate(files):
        image = _read_image(file, number, ref)
        if number == 0:
            _check_size(ref, image.shape[1], image.shape[0])
            shape = shape or (image.shape[1], image.shape[0])
        if shape is not None and image.shape[1::-1] != shape:
            image = cv2.resize(image, shape, interpolation=cv2.INTER_AREA)
        yield np.ascontiguousarray(image[..., ::-1])


def _read_image(file: Path, number: int, ref: VideoRef) -> NDArray[np.uint8]:
    """One picture, uint8 BGR. The end marker is checked because the decoder fills what a cut-off picture lacks with
    grey."""
    reason: Literal["truncated", "unreadable"] = "truncated" if number else "unreadable"
    try:
        data = file.read_bytes()
    except OSError as error:
        raise VideoError(ref.path, reason, f"cannot read {file.name}: {error.strerror}") from error
    whole = data.rfind(b"\xff\xd9") > data.rfind(b"\xff\xda") if data[:2] == b"\xff\xd8" else b"IEND" in data[-64:]
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) if whole else None
    except cv2.error:  # among others, more pixels than OpenCV allows
        image = None
    if image is None:
        raise VideoError(ref.path, reason, f"{file.name} is not a whole JPEG or PNG picture")
    return np.asarray(image, np.uint8)


def _check_size(ref: VideoRef, width: int, height: int) -> None:
    if min(width, height) < MIN_SIDE:
        raise VideoError(ref.path, "too_small", f"frames of {width}x{height} pixels; both sides must have {MIN_SIDE} or more")


def video_ref(path: str | Path) -> VideoRef:
    """VideoRef of one file or frame folder, with its name as id: for tools that work on a single video."""
    path = Path(path)
    return VideoRef(path.name, path, "frames" if path.is_dir() else "file")
