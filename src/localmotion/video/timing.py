"""Pictures in time: fields of interlaced pictures, a given frame rate, and what was found about both."""

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
"""Seconds between two pictures above which time stamps count as broken ("odd_times")."""


class Picture(NamedTuple):
    """A decoded picture."""

    frame: Any
    seconds: float
    """When it is shown; NaN where the file does not say."""
    interlaced: bool


@dataclass
class Decoding:
    """What `iter_frames` found about the frames that it has yielded; give it one to fill.

    `take` is for the frames since the last call, so that each part of a long video can have its own.
    """

    rate: float = 0.0
    """Frames per second of what is yielded where a rate was asked for; 0 where frames come as recorded."""
    tick: float = 0.0
    """Seconds by which the container rounds times."""
    frames: int = 0
    repeated: int = 0
    """Frames that show the same recorded picture as the one before, because fewer were recorded than asked for."""
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
        """JSON-able findings, and a new start.

        fps: frames per second of what was yielded; absent where unknown (frame folders without a given rate).
        vfr: true where the recorded rate varies, as in `probe`, and none was asked for. repeated, interlaced: numbers
        of such frames, hdr: "pq" or "hlg"; absent where there are none.
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
    """The picture shown nearest to each of the times 0, 1 / fps, 2 / fps, ... behind the first one.

    Of two equally near ones, up to the rounding of times to ``tick`` seconds, the earlier is taken. The last picture
    lasts as long as the one before it, but no longer than twice what is ``usual``. A picture comes again, as the same object, where
    the video has fewer than ``fps``. ``usual``: recorded frames per second, also for pictures without time; None where
    unknown. Raises VideoError "odd_times" where times go back by more than a second or jump by more than `MAX_GAP`; one
    of ``pictures`` comes when all pictures before it are out.
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
    """Pictures of which none shows two moments.

    From the first one that is marked as interlaced, all pass the filter bwdif, which changes those that are so marked:
    it keeps the lines of the earlier field and makes the others from them and from the pictures before and after. A
    video that has none pays nothing. A VideoError of ``pictures`` comes when all pictures before it are out.
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
