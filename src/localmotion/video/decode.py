"""Decode a video file or a frame folder to square uint8 RGB frames.

Colour conversion and resizing are one pass with one thread, which measured fastest because clips, not frames, are processed in
parallel. Resizing averages areas and changes the aspect ratio to a square, as IPV's release does (thuml/ContextWM).

Damage is never hidden: a file that ends early or has damaged frames raises VideoError at that frame. Only local files in the
containers listed in `_FORMATS` are opened, so a playlist renamed to .mp4 cannot make the decoder read other files or the network.
Sizes are read from headers, and checked, before anything of that size is allocated.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice, pairwise
from math import nan
from pathlib import Path
from typing import Any, Literal

import av
import cv2
import numpy as np
from numpy.typing import NDArray

from localmotion.errors import VideoError
from localmotion.video import streams
from localmotion.video.colour import Converter, hdr_of, opaque
from localmotion.video.container import check_complete, quarter_turns
from localmotion.video.libav import ERRORS, LENIENT_METADATA, fault, listening, memory_fault, words
from localmotion.video.listing import VideoRef, frame_files, shown
from localmotion.video.parts import before, pictures_of, seek
from localmotion.video.pictures import has_alpha, picture_size
from localmotion.video.timing import Decoding, Picture, deinterlaced, resampled

MIN_SIDE = 16
"""Pictures with a side below this many pixels are refused ("too_small"), because they show no motion."""
MAX_PIXELS = 2**26
"""Frames above this many pixels (twice 8K) are refused ("too_large"), because a small file could claim any amount of memory. The
limit is also passed to the decoder, so a stream cannot grow later."""
MAX_PICTURE_BYTES = 2**29
"""Files of frame folders above this size are refused ("too_large"): `MAX_PIXELS` of four 16-bit channels, not packed."""

_FORMATS = f"mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,{streams.FORMATS}"


@dataclass(frozen=True)
class VideoInfo:
    """Properties of a video from its headers; `width` and `height` are as shown, i.e. after `rotation`."""

    frames: int
    """Number of packets (files) or pictures (folders); only the first frame is decoded."""
    width: int
    height: int
    fps: float | None
    """Mean frames per second; None when unknown (frame folders)."""
    codec: str
    pix_fmt: str
    rotation: int
    """Degrees, counter-clockwise, by which decoded pictures are rotated for display: 0, 90, 180 or 270."""
    duration: float | None
    """Seconds; None when unknown."""
    vfr: bool
    """Frame intervals differ by more than a tenth of their median."""
    bits: int
    """Bits per colour component of the stored pictures."""
    pixel_aspect: float
    """Width of a pixel over its height; 1.0 when square or unknown."""
    mirrored: bool = False
    """Left and right of decoded pictures are swapped, before `rotation`, for display."""
    interlaced: bool = False
    """The first picture is interlaced: odd and even lines are from two moments."""
    hdr: str = ""
    """"pq" or "hlg" for pictures of high dynamic range."""


def probe(ref: VideoRef) -> VideoInfo:
    """Read a video's properties without decoding more than its first frame.

    Raises VideoError with reason "unreadable", "no_video_stream", "too_small", "too_large", "odd_rotation" (a rotation
    that is not a quarter turn), "decoder_memory", or the reason of the listing's `fault`; frame folders also "mixed_frames".
    """
    ref.check()
    if ref.kind == "frames":
        files = frame_files(ref.path)
        height, width = _read_image(files[0], 0, ref).shape[:2]
        return VideoInfo(len(files), width, height, None, files[0].suffix[1:].lower(), "rgb24", 0, None, False, 8, 1.0)
    if ref.kind == "stored":
        height, width = next(_stored_pictures(ref, False)).shape[:2]
        frames, fps = (ref.part.frames, ref.part.fps) if ref.part else (0, None)
        return VideoInfo(frames, width, height, fps, "picture", "rgb24", 0, fps and frames / fps, False, 8, 1.0)
    with _open(ref.path) as (container, stream):
        first: Any = None
        times: list[float] = []
        seek(container, stream, ref.part)
        for packet in _packets(ref.path, container, stream):
            if first is not None and ref.part:
                break  # number and times of the pictures are known, and checked where they are decoded
            if first is None:
                first = next(iter(_decode_packet(ref.path, packet, 0)), None)
            if packet.size and not packet.is_discard:
                times.append(float(packet.pts * packet.time_base) if packet.pts is not None else float("nan"))
        if first is None:
            raise VideoError(ref.path, "unreadable", "no frame could be decoded; the file is damaged or its codec is unknown")
        context = stream.codec_context
        _check_size(ref, first.width, first.height)
        turns, mirrored = quarter_turns(ref.path, first)
        width, height = (first.width, first.height) if turns % 2 == 0 else (first.height, first.width)
        known = sorted(time for time in times if time == time) if not ref.part else []
        gaps = [b - a for a, b in pairwise(known)]
        fps, duration, vfr = None, None, False
        if gaps and known[-1] > known[0]:
            median = sorted(gaps)[len(gaps) // 2]
            # Containers round time stamps to ticks (Matroska: 1 ms), which is not a variable frame rate.
            vfr = max(abs(gap - median) for gap in gaps) > max(0.1 * median, 2.5 * float(stream.time_base))
            fps = len(gaps) / (known[-1] - known[0])
            duration = known[-1] - known[0] + median
        if ref.part:
            fps, duration = ref.part.fps, ref.part.frames / ref.part.fps
        bits = max((component.bits for component in first.format.components), default=8)
        aspect = float(stream.sample_aspect_ratio or context.sample_aspect_ratio or 1)
        return VideoInfo(
            ref.part.frames if ref.part else len(times),
            width,
            height,
            fps,
            context.name,
            first.format.name,
            90 * turns,
            duration,
            vfr,
            bits,
            aspect,
            mirrored,
            interlaced=first.interlaced_frame,
            hdr=hdr_of(first),
        )


def iter_frames(
    ref: VideoRef,
    size: int | None,
    stride: int = 1,
    *,
    start: int = 0,
    max_frames: int | None = None,
    fps: float = 0.0,
    legacy: bool = False,
    found: Decoding | None = None,
) -> Iterator[NDArray[np.uint8]]:
    """Yield frames `start, start + stride, ...` as uint8 RGB (size, size, 3), or (H, W, 3) as shown when `size` is
    None.

    With `fps` above 0, `start` and `stride` count the frames shown at the times 0, 1 / fps, 2 / fps, ...: the recorded
    frames nearest to these times, of which some are left out or repeated. Pictures of a frame folder have no times and
    are assumed to be at `fps` already. `found` collects properties of the yielded frames.

    Interlaced pictures are deinterlaced, HDR (PQ and HLG) is mapped to standard range. `legacy` does neither, and leaves
    chroma at half the width of the frame, as recipes of algorithm 1 and 2 do.

    Memory is bounded by a few frames for any length of video. `max_frames` limits the yielded frames; damage after the
    last one is not detected. With `size` None every frame has the shape of the first. Raises VideoError as `probe`
    does, and "truncated" if the data end before the length in the container or a frame cannot be decoded completely;
    with `fps` also "odd_times" if times are missing, go back or jump. Of a file with a `part` exactly its pictures are used: "odd_times"
    or "wrong_length" if they are not those that it promises, in number and time.
    """
    if stride < 1 or start < 0 or (max_frames is not None and max_frames < 1) or (size is not None and size < 1) or not fps >= 0:
        raise ValueError(f"stride {stride}, start {start}, max_frames {max_frames}, size {size}, fps {fps}: out of range")
    ref.check()
    found = found or Decoding()
    found.rate = fps / stride
    if ref.kind == "frames":
        for frame in _folder_frames(ref, size, stride, start, max_frames, legacy):
            found.add(nan)
            yield frame
    elif ref.kind == "stored":
        for frame in _in_one_size(ref, _stored_pictures(ref, legacy, start, stride, max_frames), size):
            found.add(nan)
            yield frame
    else:
        yield from _file_frames(ref, size, stride, start, max_frames, fps, legacy, found)


def decode(
    ref: VideoRef,
    size: int | None,
    *,
    stride: int = 1,
    start: int = 0,
    max_frames: int | None = None,
    fps: float = 0.0,
    legacy: bool = False,
) -> NDArray[np.uint8]:
    """Whole clip as uint8 RGB (T, size, size, 3); `iter_frames` stacked. Raises VideoError, "too_short" if no frame
    remains."""
    frames = list(iter_frames(ref, size, stride, start=start, max_frames=max_frames, fps=fps, legacy=legacy))
    if not frames:
        raise VideoError(ref.path, "too_short", f"has no frame at or behind frame {start}")
    return np.stack(frames)


# --------------------------------------------------------------------------------------------------------------- files


@contextmanager
def _open(path: Path) -> Iterator[tuple[Any, Any]]:
    """Container and picture stream of a file. PyAV's default (no log level) keeps libav's messages off stderr."""
    try:
        status = path.stat()
    except FileNotFoundError as error:
        raise VideoError(path, "unreadable", "no such file (or a broken link)") from error
    except OSError as error:  # for example a link to itself, or a folder without permission
        raise VideoError(path, "unreadable", f"cannot be reached: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise VideoError(path, "unreadable", "is not a regular file")
    if status.st_size == 0:
        raise VideoError(path, "unreadable", "is empty (0 bytes); copy it again")
    limits = {"max_pixels": str(2 * MAX_PIXELS)}  # twice, because decoders also count their margins
    options = {"protocol_whitelist": "file", "format_whitelist": _FORMATS, **limits}
    try:
        # An absolute path cannot be read as a URL. Metadata in an odd encoding do not make a video unusable.
        with listening("matroska,webm") as complaints:  # opening reads ahead
            container = av.open(str(path.absolute()), options=options, **LENIENT_METADATA)
    except ERRORS as error:
        raise fault(path, "unreadable", f"is not a readable video ({words(error)}); copy or encode it again", error) from error
    with container:
        if complaints:
            raise VideoError(path, "truncated", f"is damaged ({complaints[0]})")
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
        stream.codec_context.options = limits
        width, height = stream.codec_context.width, stream.codec_context.height
        if width * height > MAX_PIXELS:
            raise VideoError(path, "too_large", f"frames of {width}x{height} pixels are beyond {MAX_PIXELS} pixels")
        yield container, stream


def _packets(path: Path, container: Any, stream: Any) -> Iterator[Any]:
    """Packets of the stream, including the empty one at the end. Raises VideoError "truncated" when the container
    breaks."""
    count = 0
    demuxer = container.demux(stream)
    kind = container.format.name
    names = [kind] if kind in ("matroska,webm", *streams.FORMATS.split(",")) else []
    while True:
        try:
            with listening(*names) as complaints:
                packet = next(demuxer)
        except StopIteration:
            streams.check_stream(path, kind)
            return
        except (av.error.FFmpegError, OSError) as error:
            raise fault(path, "truncated", f"data break off behind {count} packets ({words(error)})", error) from error
        if complaints:
            raise VideoError(path, "truncated", f"is damaged behind {count} packets ({complaints[0]})")
        streams.check_packet(path, kind, packet, count)
        count += 1
        yield packet


def _decode_packet(path: Path, packet: Any, done: int) -> list[Any]:
    try:
        with listening("ffv1" if packet.stream.codec_context.name == "ffv1" else "") as complaints:
            frames = packet.decode()
    except av.error.EOFError:
        return []
    except ERRORS as error:
        reason = "truncated" if done else "unreadable"
        raise fault(path, reason, f"cannot be decoded behind frame {done} ({words(error)})", error) from error
    if complaints:
        raise VideoError(path, "truncated", f"frame {done} is damaged ({complaints[0]})")
    return list(frames)


def _pictures(ref: VideoRef, container: Any, stream: Any) -> Iterator[Picture]:
    """All decoded pictures of a file, complete ones only; VideoError if there is none, or if the next is damaged."""
    done = packets = 0
    seek(container, stream, ref.part)
    for packet in _packets(ref.path, container, stream):
        if packet.size or packet.dts is not None:
            packets += 1
        for frame in _decode_packet(ref.path, packet, done):
            if before(frame, ref.part):
                continue
            if frame.is_corrupt:
                raise VideoError(ref.path, "truncated", f"frame {done} is damaged")
            _check_size(ref, frame.width, frame.height)
            known = frame.pts is not None and frame.time_base
            yield Picture(frame, float(frame.pts * frame.time_base) if known else nan, frame.interlaced_frame)
            done += 1
    if done == 0:
        raise VideoError(ref.path, "unreadable", "no frame could be decoded; the file is damaged or its codec is unknown")
    if not ref.part or ref.part.alone:
        check_complete(ref.path, container, stream, packets)


def _file_frames(
    ref: VideoRef, size: int | None, stride: int, start: int, max_frames: int | None, fps: float, legacy: bool, found: Decoding
) -> Iterator[NDArray[np.uint8]]:
    converter = Converter(ref.path, legacy=legacy)
    yielded = 0
    shown: Any = None  # the last yielded picture, and its pixels
    pixels = np.zeros((0, 0, 3), np.uint8)
    with _open(ref.path) as (container, stream):
        found.tick = float(stream.time_base)
        pictures = _pictures(ref, container, stream)
        first = next(pictures)  # there is at least one, or an error was raised
        turns, mirrored = quarter_turns(ref.path, first.frame)
        shape = (size, size) if size else (first.frame.width, first.frame.height)
        pictures = chain([first], pictures)
        if ref.part:
            pictures = pictures_of(ref.part, pictures, ref.path)
        if not legacy:
            pictures = deinterlaced(pictures, ref.path)
        if fps:
            rate = stream.average_rate or stream.guessed_rate
            pictures = resampled(pictures, fps, ref.path, float(rate) if rate else None, found.tick)
        for number, (frame, seconds, interlaced) in enumerate(pictures):
            if number < start or (number - start) % stride:
                continue
            again = frame is shown
            if not again:
                pixels = converter.rgb(frame, *shape)
                pixels = np.ascontiguousarray(np.rot90(pixels[:, ::-1] if mirrored else pixels, turns))
            shown = frame if fps else None  # without fps no picture repeats, and the decoder can reuse its memory
            found.add(seconds, repeated=again, interlaced=interlaced and not legacy, hdr=hdr_of(frame))
            yield pixels.copy() if fps else pixels
            yielded += 1
            if yielded == max_frames:
                return


# ------------------------------------------------------------------------------------------------------- frame folders


def _folder_frames(
    ref: VideoRef, size: int | None, stride: int, start: int, max_frames: int | None, legacy: bool
) -> Iterator[NDArray[np.uint8]]:
    files = frame_files(ref.path)[start::stride][:max_frames]
    images = (_read_image(file, number, ref, legacy) for number, file in enumerate(files))
    yield from _in_one_size(ref, images, size, names=[file.name for file in files])


def _stored_pictures(
    ref: VideoRef, legacy: bool, start: int = 0, stride: int = 1, max_frames: int | None = None
) -> Iterator[NDArray[np.uint8]]:
    """Pictures of a table, uint8 BGR."""
    assert ref.rows
    stop = None if max_frames is None else start + stride * (max_frames - 1) + 1
    for number, data in enumerate(islice(ref.rows.pictures(), start, stop, stride)):
        yield _image(data, f"picture {start + stride * number}", "truncated" if number else "unreadable", ref, legacy)


def _in_one_size(
    ref: VideoRef, images: Iterator[NDArray[np.uint8]], size: int | None, names: Sequence[str] = ()
) -> Iterator[NDArray[np.uint8]]:
    """BGR pictures as RGB, (size, size, 3), or as they are. Raises VideoError "mixed_sizes" if one has another size than the first."""
    shape: tuple[int, int] | None = (size, size) if size else None
    first: tuple[int, ...] | None = None
    for number, image in enumerate(images):
        shape = shape or (image.shape[1], image.shape[0])
        first = first or image.shape
        if image.shape != first:
            (height, width), (usual_height, usual_width) = image.shape[:2], first[:2]
            name = shown(names[number]) if names else f"picture {number}"
            what = f"{name} has {width}x{height} pixels, the pictures before it {usual_width}x{usual_height}"
            raise VideoError(ref.path, "mixed_sizes", f"{what}; keep pictures of one size in a folder")
        if image.shape[1::-1] != shape:
            image = cv2.resize(image, shape, interpolation=cv2.INTER_AREA)
        yield np.ascontiguousarray(image[..., ::-1])


def _read_image(file: Path, number: int, ref: VideoRef, legacy: bool = False) -> NDArray[np.uint8]:
    """One picture of a folder, uint8 BGR."""
    reason: Literal["truncated", "unreadable"] = "truncated" if number else "unreadable"
    name = shown(file.name)
    try:
        data = _read_regular(file)
    except OSError as error:
        wrong = "too_large" if error.errno == errno.EFBIG else reason
        raise VideoError(ref.path, wrong, f"cannot read {name}: {error.strerror}") from error
    return _image(data, name, reason, ref, legacy, file.suffix.lower())


def _image(data: bytes, name: str, reason: str, ref: VideoRef, legacy: bool, suffix: str = ".png") -> NDArray[np.uint8]:
    """An encoded picture, uint8 BGR. Its size and completeness are checked first, because the decoder allocates the size in the
    header and fills the missing part of a cut-off picture with grey."""
    try:
        size = picture_size(data, suffix)
    except ValueError as error:
        raise VideoError(ref.path, reason, f"{name} {error}") from error
    _check_size(ref, *size)
    image = None
    try:
        transparent = not legacy and has_alpha(data)
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED if transparent else cv2.IMREAD_COLOR)
        if image is not None and transparent:
            image = opaque(image)
    except cv2.error as error:
        if error.code == cv2.Error.StsNoMem:
            raise memory_fault(ref.path) from error
    if image is None:
        raise VideoError(ref.path, reason, f"{name} cannot be decoded; it is damaged or of a kind that is not read")
    return np.asarray(image, np.uint8)


def _read_regular(file: Path) -> bytes:
    """Content of a regular file. Pipes and devices are refused: opening a pipe waits for its writer, and reading a device may never end."""
    handle = os.open(file, os.O_RDONLY | os.O_NONBLOCK)
    with open(handle, "rb") as stream:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "is not a regular file")
        if status.st_size > MAX_PICTURE_BYTES:
            raise OSError(errno.EFBIG, f"has {status.st_size} bytes, more than {MAX_PICTURE_BYTES}")
        return stream.read(status.st_size)


def _check_size(ref: VideoRef, width: int, height: int) -> None:
    if min(width, height) < MIN_SIDE:
        raise VideoError(ref.path, "too_small", f"frames of {width}x{height} pixels; both sides must have {MIN_SIDE} or more")
    if width * height > MAX_PIXELS:
        raise VideoError(ref.path, "too_large", f"frames of {width}x{height} pixels are beyond {MAX_PIXELS} pixels")


def video_ref(path: str | Path) -> VideoRef:
    """VideoRef of one file or frame folder, with its name as id, for tools that read a single video."""
    path = Path(path)
    return VideoRef(path.name, path, "frames" if path.is_dir() else "file")
