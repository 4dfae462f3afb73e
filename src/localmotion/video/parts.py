"""Videos that are a part of a file: find their first picture without decoding the file up to it, and take exactly their pictures."""

from __future__ import annotations

from collections.abc import Iterator
from math import isnan
from pathlib import Path
from typing import Any

from localmotion.errors import VideoError
from localmotion.video.refs import Part
from localmotion.video.timing import Picture

_REORDERED = 20
"""Pictures by which the order in the file may differ from the order in time. H.264 and HEVC allow 16."""


def seek(container: Any, stream: Any, part: Part | None) -> None:
    """Move to a picture before the part from which decoding can begin. Does nothing without a part, or if it is near the beginning."""
    if part is None:
        return
    seconds = part.start - 1 - _REORDERED / part.fps
    if seconds > 0:
        container.seek(int(seconds / stream.time_base), stream=stream)


def before(frame: Any, part: Part | None) -> bool:
    """Whether a decoded picture is shown before the part begins."""
    if part is None or frame.pts is None or not frame.time_base:
        return False
    return _number(float(frame.pts * frame.time_base), part) < 0


def pictures_of(part: Part, pictures: Iterator[Picture], path: Path) -> Iterator[Picture]:
    """The pictures of a part, in the order of time. The nearest of the times `start + i / fps` decides which one a picture is.

    Raises VideoError "odd_times" if a picture is missing or shown twice, "wrong_length" if the file has fewer pictures, or others in a
    part that is `alone`.
    """
    count = 0
    for picture in pictures:
        if isnan(picture.seconds):
            raise VideoError(path, "odd_times", "its pictures have no times, so the parts of the file cannot be told apart")
        number = _number(picture.seconds, part)
        if number < 0:
            continue
        if number >= part.frames and not part.alone:
            break
        if number != count:
            at = f"picture {count} of {part.frames}, at {part.start + count / part.fps:.4f} s"
            raise VideoError(path, "odd_times", f"has no picture where {at}, must be; the next is at {picture.seconds:.4f} s")
        if number >= part.frames:
            raise VideoError(path, "wrong_length", f"has more than the {part.frames} pictures that its table has rows")
        yield picture
        count += 1
    if count < part.frames:
        raise VideoError(path, "wrong_length", f"has {count} pictures from {part.start:.4f} s on, its table {part.frames} rows")


def _number(seconds: float, part: Part) -> int:
    return round((seconds - part.start) * part.fps)
