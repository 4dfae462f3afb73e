"""Shared by the modules that use PyAV: its errors as VideoError, and differences between its versions."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av

from localmotion.errors import VideoError

LENIENT_METADATA: dict[str, Any] = {"metadata_errors": "replace"} if int(av.__version__.partition(".")[0]) < 19 else {}
"""Arguments of `av.open` that accept metadata in any encoding. PyAV 19 always accepts it and has no such argument."""

ERRORS = (av.error.FFmpegError, OSError, ValueError)
"""Exceptions that PyAV raises for bad data."""


def words(error: BaseException) -> str:
    """First line of an error's message."""
    return str(getattr(error, "strerror", None) or error).split("\n")[0]


def memory_fault(path: Path) -> VideoError:
    """The error for a video whose decoding exceeded the memory limit."""
    return VideoError(path, "decoder_memory", "decoding needs more memory than the limit; raise the limit or encode it smaller")


def fault(path: Path, reason: str, detail: str, error: BaseException) -> VideoError:
    """A VideoError for an error of libav; lack of memory has its own reason."""
    return memory_fault(path) if getattr(error, "errno", None) == errno.ENOMEM else VideoError(path, reason, detail)


@contextmanager
def listening(*names: str) -> Iterator[list[str]]:
    """Collect the errors that the named parts of libav log inside the context. Some parts report damage only in the log and continue.

    The Matroska demuxer skips to the next valid position and loses the frames between. FFV1 detects damage by its checksums, leaves
    old buffer content in its place, and returns the frame as good. Other parts also log errors for good pictures, so they are not
    collected.
    """
    told: list[str] = []
    if not any(names):
        yield told
        return
    level, skip = av.logging.get_level(), av.logging.get_skip_repeated()
    av.logging.set_level(av.logging.ERROR)
    av.logging.set_skip_repeated(False)  # else a repeated message of one file is reported with the next file
    try:
        with av.logging.Capture() as lines:
            try:
                yield told
            finally:
                told += [" ".join(text.split()) for _, name, text in lines if name in names]
    finally:
        av.logging.set_level(level)
        av.logging.set_skip_repeated(skip)
