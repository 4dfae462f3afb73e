"""What the modules that use PyAV share: its errors as VideoError, and what differs among its versions."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av

from localmotion.errors import VideoError

LENIENT_METADATA: dict[str, Any] = {"metadata_errors": "replace"} if int(av.__version__.partition(".")[0]) < 19 else {}
"""Arguments of `av.open` that accept metadata in any encoding. PyAV 19 accepts it always and has no such argument."""

ERRORS = (av.error.FFmpegError, OSError, ValueError)
"""What PyAV raises for bad data."""


def words(error: BaseException) -> str:
    """First line of what an error says."""
    return str(getattr(error, "strerror", None) or error).split("\n")[0]


def memory_fault(path: Path) -> VideoError:
    """The error for a video whose decoding was refused memory."""
    return VideoError(path, "decoder_memory", "decoding wants more memory than it may have; raise the limit or encode it smaller")


def fault(path: Path, reason: str, detail: str, error: BaseException) -> VideoError:
    """A VideoError for what libav says; lack of memory has a reason of its own."""
    return memory_fault(path) if getattr(error, "errno", None) == errno.ENOMEM else VideoError(path, reason, detail)


@contextmanager
def listening(*names: str) -> Iterator[list[str]]:
    """What these parts of libav log as errors meanwhile: those that tell damage to the log alone, and go on as if nothing were.

    The Matroska demuxer looks for the next place that makes sense, and the frames between are gone. FFV1 finds damage by its
    checksums, leaves what lay in the buffer in its place, and hands the frame out as good. Others log errors over pictures that are
    fine, so theirs do not count.
    """
    told: list[str] = []
    if not any(names):
        yield told
        return
    level, skip = av.logging.get_level(), av.logging.get_skip_repeated()
    av.logging.set_level(av.logging.ERROR)
    av.logging.set_skip_repeated(False)  # else what one file said twice comes out when the next one says something
    try:
        with av.logging.Capture() as lines:
            try:
                yield told
            finally:
                told += [" ".join(text.split()) for _, name, text in lines if name in names]
    finally:
        av.logging.set_level(level)
        av.logging.set_skip_repeated(skip)
