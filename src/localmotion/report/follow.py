"""Follow a run directory and send its numbers, pictures and films to one tracker: `python -m localmotion.report.follow`.

`training.tracking` starts it beside a run, one process for each tracker. It reads what the run writes and does nothing to
the run. If it fails, the run goes on.

A resumed run drops the lines of metrics.jsonl that follow its checkpoint and writes them again. RUN/tracking/NAME.json
holds the tracker's id of the run and what was sent. A line that was sent already is left out; a line that was not is sent,
also those of before the tracker was asked for. Trackers that can replace points (`Tracker.rewinds`) get the new ones.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from localmotion.errors import CheckpointError, LocalmotionError
from localmotion.files import Lock, one_line, read_json, write_json
from localmotion.report.trackers import TRACKERS, Point, Start, Tracker
from localmotion.runs.read import Line, Tail, count_of, flatten, is_number

EVERY = 1.0
"""Seconds between two looks at the run."""
PAUSE = 60.0
"""Seconds until a tracker that failed is tried again."""
COUNTERS = ("update", "agent_step", "env_step", "episode")
NOT_SENT = {*COUNTERS, "kind", "wall", "seed"}

Place = tuple[list[int], int]
"""Counters of a line, and its number among the lines of its kind with these counters. It grows within a kind."""


class Read(NamedTuple):
    """A line of metrics.jsonl with its place and its step on the run's axis."""

    line: Line
    place: Place
    step: int


class Follower:
    """Sends a run to a tracker, each line once.

    Args:
        path: the run directory.
        make: opens the tracker.
        name: of RUN/tracking/NAME.json.
    """

    def __init__(self, path: Path, make: type[Tracker] | Callable[[Start], Tracker], name: str, rewinds: bool = False) -> None:
        self.path, self.make, self.rewinds = path, make, rewinds
        self.kept = path / "tracking" / f"{name}.json"
        self.tracker: Tracker | None = None
        self.noted, self.saved = "", 0.0  # the state as it was saved, and when
        self._begin()

    def _begin(self) -> None:
        """Read the state, and metrics.jsonl from its beginning."""
        state = read_json(self.kept, CheckpointError, "remove it to begin a new curve") if self.kept.exists() else {}
        try:
            self.id = str(state.get("id") or uuid.uuid4().hex[:12])
            if not re.fullmatch("[0-9a-z]{4,32}", self.id):
                raise ValueError(f"id {self.id!r:.50}")
            self.number = int(state.get("number", 0))
            self.sent: dict[str, Place] = {
                str(kind): ([int(n) for n in counters], int(times)) for kind, (counters, times) in state.get("sent", {}).items()
            }
            self.media: dict[str, list[int]] = {str(k): [int(a), int(b)] for k, (a, b) in state.get("media", {}).items()}
        except (TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{self.kept}: cannot be read ({one_line(error)}); remove it to begin a new curve") from error
        self.noted = json.dumps(state) if state else ""
        self._from_the_start()

    def _from_the_start(self) -> None:
        self.tail = Tail(self.path / "metrics.jsonl")
        self.places: dict[str, Place] = {}
        self.judged: int | None = None
        """Step of the last held-out figures or evaluation: pictures that are overwritten belong to it."""

    def _new_lines(self) -> Iterator[Read]:
        for line in self.tail.new():
            axis = _axis(line) if line else None
            if line is None or axis is None:
                continue
            kind, counters = line["kind"], [count_of(line, key) for key in COUNTERS]
            before, times = self.places.get(kind, ([], 0))
            place = (counters, times + 1 if counters == before else 1)
            self.places[kind] = place
            if kind in ("heldout", "eval"):
                self.judged = count_of(line, axis)
            yield Read(line, place, count_of(line, axis))

    def _is_new(self, read: Read) -> bool:
        return read.place > self.sent.get(read.line["kind"], ([], 0))

    def _open(self) -> None:
        self._begin()
        again = self._rewind() if self.rewinds and self.noted else None
        config = flatten(read_json(self.path / "config.json", CheckpointError, "restore it"))
        axis = next((axis for line in Tail(self.path / "metrics.jsonl").new() if line and (axis := _axis(line))), None)
        if axis is None:
            return  # nothing to send yet
        self.tracker = self.make(Start(self.path, self.id, config, axis, again))
        self._save()  # the id, before anything is sent

    def _rewind(self) -> int:
        """The first step to send again: the last one of metrics.jsonl, or an earlier one that was not sent.

        What counts as sent is then reduced to the steps before it.
        """
        again: int | None = None
        last = 0
        for read in self._new_lines():
            last = read.step
            if again is None and self._is_new(read):
                again = read.step
        again = last if again is None else again
        self._from_the_start()
        self.sent = {read.line["kind"]: read.place for read in self._new_lines() if read.step < again}
        self.media = {name: [stamp, step] for name, (stamp, step) in self.media.items() if step < again}
        self._from_the_start()
        return again

    def catch_up(self) -> None:
        """Send what the run wrote since the last call. Raises any error of the tracker; `drop` it then."""
        if self.tracker is None:
            self._open()
        if self.tracker is None:
            return
        for read in self._new_lines():
            if self._is_new(read):
                if point := self._point(read):
                    self.tracker.log(point)
                    self.number += 1
                self.sent[read.line["kind"]] = read.place
                if time.monotonic() - self.saved > EVERY:
                    self._save()
        self._save()
        self._send_media(self.tracker)
        self._save()

    def _point(self, read: Read) -> Point | None:
        line = read.line
        kind = "prefill" if line.get("random") is True else line["kind"]
        values = {f"{kind}/{key}": float(value) for key, value in line.items() if key not in NOT_SENT and is_number(value)}
        counters = {key: count_of(line, key) for key in COUNTERS if key in line}
        return Point(self.number, read.step, values, counters) if values else None

    def _send_media(self, tracker: Tracker) -> None:
        """Films and pictures that are new, or that changed since an earlier step."""
        for file in sorted(self.path.glob("media/[!.]*")):
            number = re.fullmatch(r"eval_([0-9]{1,15})", file.stem)
            step = int(number[1]) if number else self.judged
            stamp = file.stat().st_mtime_ns
            before, sent = self.media.get(file.name, [0, -1])
            if step is None or stamp == before or step <= sent:
                continue
            try:
                shown = self._send_file(tracker, step, f"media/{'eval' if number else file.stem}", file)
            except (LocalmotionError, OSError, ValueError) as error:
                print(f"{file.name}: {one_line(error)}", flush=True)  # into the log of this process
                shown = False  # a file that is not complete yet changes again
            self.media[file.name] = [stamp, step if shown else sent]

    def _send_file(self, tracker: Tracker, step: int, name: str, file: Path) -> bool:
        """Whether ``file`` holds anything to show."""
        if file.suffix == ".mp4":
            tracker.film(self.number, step, name, file)
            self.number += 1
            return True
        from localmotion.report.grids import grid

        picture = grid(file)
        if picture is None:
            return False
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / f"{file.stem}.png").write_bytes(picture)
            tracker.picture(self.number, step, name, Path(folder) / f"{file.stem}.png")
        self.number += 1
        return True

    def drop(self) -> None:
        """Give the tracker up, whatever that takes; the next `catch_up` opens it again."""
        tracker, self.tracker = self.tracker, None
        if tracker is not None:
            with contextlib.suppress(Exception):
                self._save(tracker)
            with contextlib.suppress(Exception):
                tracker.close()

    def close(self) -> None:
        """End the session. Raises any error of the tracker."""
        if self.tracker is not None:
            self.tracker.close()

    def _save(self, tracker: Tracker | None = None) -> None:
        """Note what was sent, if anything was since the last time."""
        state = {"id": self.id, "number": self.number, "sent": self.sent, "media": self.media}
        if (text := json.dumps(state)) != self.noted:
            if tracker := tracker or self.tracker:
                tracker.flush()
            self.kept.parent.mkdir(exist_ok=True)
            write_json(self.kept, state)
            self.noted, self.saved = text, time.monotonic()


def _axis(line: Line) -> str | None:
    return next((key for key in ("env_step", "update") if is_number(line.get(key))), None)


# The process ---------------------------------------------------------------------------------------------------------------


class Parent:
    """The process that trains. When its run has ended, it closes the input of this process."""

    def __init__(self) -> None:
        self.pid = os.getppid()

    def ended(self, seconds: float) -> bool:
        """Wait for its end for so many seconds. True also if it was killed: a worker that outlives it may hold the input open."""
        return bool(select.select([sys.stdin], [], [], seconds)[0]) or os.getppid() != self.pid


def wait_for(status: Path, stamp: int, parent: Parent) -> bool:
    """Wait until the run has begun: ``status`` has another time (ns) than ``stamp``. False if the run ended before."""

    def begun() -> bool:
        return status.exists() and status.stat().st_mtime_ns != stamp

    while not begun():
        if parent.ended(0.1) and not begun():
            return False
    return True


def follow(path: Path, name: str, parent: Parent, warn: Callable[[str], None]) -> None:
    """Follow the run to its end. A failure is a warning, once; the tracker is tried again after `PAUSE` and at the end."""
    over, warned, wait = False, False, 0.0
    follower: Follower | None = None
    lock: Lock | None = None
    while not over:
        over = parent.ended(wait)
        wait = EVERY
        try:
            lock = lock or _lock(path, name, parent)
            follower = follower or Follower(path, TRACKERS[name], name, TRACKERS[name].rewinds)
            follower.catch_up()
            if over:
                follower.close()
        except Exception as error:  # of a foreign library, the network or the disk: the run must not notice
            if not warned:
                warn(f"tracker {name}: {one_line(error)}; the run goes on, and its metrics.jsonl has every point")
            warned, wait = True, PAUSE
            if follower is not None:
                follower.drop()


def _lock(path: Path, name: str, parent: Parent) -> Lock:
    """Wait for the follower of a session that was killed: it sends what it has and ends."""
    (path / "tracking").mkdir(exist_ok=True)
    while not (lock := Lock(path / "tracking" / f"{name}.lock")).taken:
        lock.release()
        parent.ended(0.2)
    return lock


def main(path: Path, name: str, stamp: int) -> None:
    """The process of one tracker.

    ``stamp``: time (ns) of RUN/status.json before the run. Once it has changed, metrics.jsonl is cut to the run's checkpoint. What
    the tracker's library prints goes to RUN/tracking/NAME.log, one warning to the run's own errors.
    """
    os.nice(5)
    parent = Parent()
    if not wait_for(path / "status.json", stamp, parent):
        return
    errors = os.fdopen(os.dup(2), "w")

    def warn(text: str) -> None:
        with contextlib.suppress(OSError):
            print(f"warning: {text}", file=errors, flush=True)

    try:
        (path / "tracking").mkdir(exist_ok=True)
        log = os.open(path / "tracking" / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    except OSError:
        log = os.open(os.devnull, os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    follow(path, name, parent, warn)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
