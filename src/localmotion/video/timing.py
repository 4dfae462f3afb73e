"""Pictures in time: deinterlacing, resampling to a frame rate, and a record of both."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from math import isnan, nan
from pathlib import Path
from typing import Any, NamedTuple

from av.filter import Graph

from localmotion.errors import VideoError
from localmotion.video.libav import ERRORS, fault, words

MAX_GAP = 600.0
"""Time stamps with more seconds than this between two pictures are broken ("odd_times")."""


class Picture(NamedTuple):
    """A decoded picture."""

    frame: Any
    seconds: float
    """Time of display in seconds; NaN if the file does not state it."""
    interlaced: bool


@dataclass
class Decoding:
    """Collects properties of the frames that `iter_frames` yields.

    `take` returns those of the frames since the last call, so each clip of a long video has its own.
    """

    rate: float = 0.0
    """Frames per second of the yielded frames if a rate was requested; 0 if frames are yielded as recorded."""
    tick: float = 0.0
    """Seconds by which the container rounds times."""
    frames: int = 0
    repeated: int = 0
    """Frames that repeat the recorded picture before, because the recorded rate is lower than the requested one."""
    interlaced: int = 0
    hdr: str = ""
    _first: float = nan
    _last: float = nan
    _least: float = float("inf")
    _most: float = 0.0

    def add(self, seconds: float, *, repeated: bool = False, interlaced: bool = False, hdr: str = "") -> None:
        """Count one yielded frame."""
        if not isnan(self._last):
            gap = seconds - self._last
            self._least, self._most = min(self._least, gap), max(self._most, gap)
        else:
            self._first = seconds
        self._last = seconds
        self.frames += 1
        self.repeated += repeated
        self.interlaced += interlaced
        self.hdr = hdr or self.hdr

    def take(self) -> dict[str, Any]:
        """Return the collected properties, JSON-able, and reset them.

        fps: frames per second of the yielded frames; absent if unknown (frame folders without a given rate).
        vfr: true if the recorded rate varies, as in `probe`, and no rate was requested. repeated, interlaced: numbers
        of such frames; hdr: "pq" or "hlg"; absent if there are none.
        """
        found: dict[str, Any] = {}
        span = self._last - self._first
        if self.rate:
            found["fps"] = round(self.rate, 3)
        elif self.frames > 1 and span > 0:
            mean = span / (self.frames - 1)
            found["fps"] = round(1 / mean, 3)
            if self._most - self._least > max(0.1 * mean, 2.5 * self.tick):
                found["vfr"] = True
        for name in ("repeated", "interlaced", "hdr"):
            if value := getattr(self, name):
                found[name] = value
        vars(self).update(vars(Decoding(self.rate, self.tick)))
        return found


def resampled(pictures: Iterator[Picture], fps: float, path: Path, usual: float | None, tick: float) -> Iterator[Picture]:
    """The picture nearest to each of the times 0, 1 / fps, 2 / fps, ... after the first one.

    Of two equally near pictures (up to the rounding of times to ``tick`` seconds), the earlier is used. The last picture
    lasts as long as the one before it, but at most twice the ``usual`` duration. If the video has a lower rate than
    ``fps``, a picture is yielded again as the same object. ``usual``: recorded frames per second, also for pictures
    without time; None if unknown. Raises VideoError "odd_times" if times go back by more than a second or jump by more
    than `MAX_GAP`. A VideoError of ``pictures`` is raised after all pictures before it are yielded.
    """
    held: Picture | None = None
    gap = 0.0
    number, origin = 0, 0.0
    broken: VideoError | None = None
    while True:
        try:
            picture = next(pictures)
        except StopIteration:
            break
        except VideoError as error:
            broken = error
            break
        seconds = picture.seconds
        if isnan(seconds):
            if not usual:
                raise VideoError(path, "odd_times", "its pictures have no times; extract it without fps, or encode it again")
            seconds = held.seconds + 1 / usual if held else 0.0
        if held is None:
            origin = seconds
        else:
            gap = seconds - held.seconds
            if not -1 <= gap <= MAX_GAP:
                detail = f"a picture is shown {gap:.0f} seconds after the one before; extract it without fps, or encode it again"
                raise VideoError(path, "odd_times", detail)
            seconds, gap = max(seconds, held.seconds), max(gap, 0.0)
            while 2 * (origin + number / fps) <= held.seconds + seconds + min(tick, gap / 8):
                yield held
                number += 1
        held = picture._replace(seconds=seconds)
    if held is not None:
        gap = min(gap, 2 / usual) if usual else gap
        while number == 0 or 2 * (origin + number / fps) <= 2 * held.seconds + gap * 1.001:
            yield held
            number += 1
    if broken is not None:
        raise broken


def deinterlaced(pictures: Iterator[Picture], path: Path) -> Iterator[Picture]:
    """Deinterlaced pictures.

    From the first picture marked as interlaced, all pass the filter bwdif, which changes only marked ones: it keeps the
    lines of the earlier field and computes the others from them and from the pictures before and after. A video without
    interlaced pictures is not filtered. A VideoError of ``pictures`` is raised after all pictures before it are yielded.
    """
    graph: Any = None
    form: tuple[Any, ...] = ()
    waiting: deque[Picture] = deque()
    broken: VideoError | None = None

    def finished(*, end: bool) -> Iterator[Picture]:
        if end and waiting:
            graph.vpush(None)
        while waiting:
            try:
                frame = graph.vpull()
            except (BlockingIOError, EOFError):
                break
            yield waiting.popleft()._replace(frame=frame)
        assert not (end and waiting), "the filter gives as many pictures as it takes"

    try:
        while True:
            try:
                picture = next(pictures)
            except StopIteration:
                break
            except VideoError as error:
                broken = error
                break
            if graph is None and not picture.interlaced:
                yield picture
                continue
            frame = picture.frame
            if form != (now := (frame.width, frame.height, frame.format.name, frame.colorspace, frame.color_range)):
                yield from finished(end=True)
                graph, form = _bwdif(*now), now
            waiting.append(picture)
            graph.vpush(frame)
            yield from finished(end=False)
        yield from finished(end=True)
    except ERRORS as error:
        raise fault(
            path, "unreadable", f"is interlaced and cannot be deinterlaced ({words(error)}); encode it again", error
        ) from error
    if broken is not None:
        raise broken


def _bwdif(width: int, height: int, form: str, colorspace: int, color_range: int) -> Any:
    graph = Graph()
    graph.threads = 1
    size = f"video_size={width}x{height}:pix_fmt={form}:time_base=1/1000"
    nodes = [
        graph.add("buffer", f"{size}:colorspace={int(colorspace)}:range={int(color_range)}"),
        graph.add("bwdif", "mode=send_frame:deint=interlaced"),
        graph.add("buffersink"),
    ]
    graph.link_nodes(*nodes).configure()
    return graph
