"""Write frames as a video file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from localmotion.errors import LocalmotionError

_TAGS = {"colorspace": "smpte170m", "color_range": "tv", "chroma_sample_location": "center"}
"""How libswscale converts RGB to YUV. Without these tags decoders guess: chroma half a pixel to the left, and BT.709 in some players."""


def write_video(path: str | Path, frames: NDArray[np.uint8] | Iterable[NDArray[np.uint8]], fps: float, *, crf: int = 20) -> None:
    """Write (T, H, W, 3) uint8 RGB frames (an array, or frames one by one) as an mp4 at `fps` frames per second.

    H.264 with quality `crf` (0..51, smaller is better) if PyAV's FFmpeg has it, else MPEG-4. An odd width or
    height is kept, but then needs a pixel format (4:4:4) that some players cannot show. The file is written atomically;
    its folder is created. Raises ValueError for frames of another type or shape, LocalmotionError if the file cannot be
    written.
    """
    path = Path(path)
    partial = path.with_name(f".{path.stem}.partial-{os.getpid()}{path.suffix or '.mp4'}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(partial.absolute()), "w", format="mp4") as container:
            stream: Any = None
            for frame in frames:
                if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
                    raise ValueError(f"frames must be (H, W, 3) uint8, got {frame.shape} {frame.dtype}")
                if stream is None:
                    stream = _stream(container, frame.shape[1], frame.shape[0], fps, crf)
                elif frame.shape[:2] != (stream.height, stream.width):
                    raise ValueError(f"frames change size, from {stream.height}x{stream.width} to {frame.shape[:2]}")
                picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
                container.mux(stream.encode(picture))
            if stream is None:
                raise ValueError("no frame to write")
            container.mux(stream.encode(None))
        os.replace(partial, path)
    except (OSError, av.error.FFmpegError) as error:
        raise LocalmotionError(f"{path}: cannot write the video ({error.strerror})") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def _stream(container: Any, width: int, height: int, fps: float, crf: int) -> Any:
    even = width % 2 == 0 and height % 2 == 0
    codec = next((name for name in ("libx264", "libopenh264") if name in av.codecs_available), "mpeg4")
    options = {"crf": str(crf), "preset": "fast", **_TAGS} if codec == "libx264" else {}
    stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001), options=options)
    stream.width, stream.height = width, height
    stream.pix_fmt = "yuv420p" if even or codec != "libx264" else "yuv444p"
    stream.codec_context.thread_count = 1
    if codec != "libx264":
        stream.bit_rate = int(width * height * fps)
    return stream
