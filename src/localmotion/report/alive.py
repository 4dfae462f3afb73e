"""How runs that may still be going are doing: found in folders, alive or not, how far, how long to go."""

from __future__ import annotations

import contextlib
import glob
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from localmotion.errors import LocalmotionError
from localmotion.files import LOCK, one_line, read_bytes
from localmotion.report.memory import stamp
from localmotion.runs.checkpoint import complete
from localmotion.runs.read import Log, RunData, number, read_run

DEPTH = 3
"""Folders below a folder of runs that are searched."""
RATE = 20
"""Newest lines of a run from which its speed is measured."""


def find_runs(places: Sequence[str]) -> list[Path]:
    """Run directories: each place is one, a folder of them, or a glob pattern of these. Those that are not there yet are left out."""
    found: dict[Path, Path] = {}
    for place in places:
        for path in sorted(glob.glob(place)) if glob.has_magic(place) and not Path(place).exists() else [place]:
            for run in _below(Path(path), DEPTH):
                found.setdefault(run.resolve(), run)
    return list(found.values())


def _below(path: Path, depth: int) -> Iterator[Path]:
    if (path / "config.json").is_file() or (path / "metrics.jsonl").is_file():
        yield path
    elif depth:
        with contextlib.suppress(OSError):
            for entry in sorted(path.iterdir()):
                if not entry.name.startswith(".") and entry.is_dir() and not entry.is_symlink():
                    yield from _below(entry, depth - 1)


@dataclass
class Watched:
    """A run directory that is read again when it changes, and then only what was appended."""

    path: Path
    data: RunData | None = None
    damage: str = ""
    """Why it cannot be read, "" if it can."""
    name: str = ""
    """Its name on the page; "": of its folder."""
    seen: tuple[object, ...] = ()
    _log: Log | None = None
    _begun: tuple[object, ...] = field(default=())

    def look(self) -> bool:
        """Whether anything of the run has changed since the last look. Reads no file but the lock."""
        names = ("config.json", "metrics.jsonl", "status.json", "environment.json", "random.json")
        media: list[object] = []
        with contextlib.suppress(OSError), os.scandir(self.path / "media") as listing:
            media += sorted((entry.name, entry.stat().st_mtime_ns) for entry in listing if not entry.name.startswith("."))
        seen = (*(stamp(self.path / name) for name in names), *media, self.holder())
        changed, self.seen = seen != self.seen, seen
        return changed

    def read(self) -> None:
        """Read what has changed."""
        metrics = self.path / "metrics.jsonl"
        # A session of the run that resumes cuts metrics.jsonl, and adds a line to command.txt before.
        begun = (stamp(self.path / "command.txt"), metrics.stat().st_ino if metrics.exists() else 0)
        if self._log is None or begun != self._begun or stamp(metrics)[1] < self._log.tail.offset:
            self._log, self._begun = Log(metrics), begun
        try:
            self.data, self.damage = read_run(self.path, self._log), ""
        except (LocalmotionError, OSError, ValueError) as error:
            self.data, self.damage, self._log = None, one_line(error), None

    def holder(self) -> str:
        """ "alive" if the process that holds the run's lock lives, "gone" if not, a host's name if it ran on another machine."""
        try:
            host, _, pid = read_bytes(self.path / LOCK, 300).decode(errors="replace").strip().rpartition(" ")
            if host != socket.gethostname():
                return one_line(host, 60)
            os.kill(int(pid), 0)
        except PermissionError:
            return "alive"
        except (OSError, ValueError, OverflowError):
            return "gone"
        return "alive" if int(pid) > 0 else "gone"

    @property
    def state(self) -> str:
        """damaged, begins, running, killed (it ended and did not say why), or as its status says."""
        if self.data is None:
            return "damaged"
        state = one_line(self.data.state, 40)
        return {"unknown": "begins", "running": "killed" if self.holder() == "gone" else "running"}.get(state, state)

    @property
    def cause(self) -> str:
        """A sentence about a run that is damaged, failed, killed, or runs on another machine. Else ""."""
        name, holder = self.name or self.path.name, self.holder()
        if self.data is None:
            return f"{name} cannot be read: {self.damage}."
        if self.state == "failed":
            return f"{name} failed: {one_line(self.data.status.get('error', ''))}."
        if self.state == "killed":
            begun = complete(self.path / "checkpoints")
            goes_on = "goes on from its last checkpoint" if begun else "begins again: it has no checkpoint yet"
            return f"{name} is not running, and did not say why it ended. The same command {goes_on}."
        if self.state == "running" and holder not in ("alive", ""):
            return f"{name} runs on {holder}: whether it lives is only seen by its newest line."
        return ""

    @property
    def newest(self) -> float | None:
        """Time of the newest line, seconds since 1970."""
        nanoseconds, size = stamp(self.path / "metrics.jsonl")
        return nanoseconds / 1e9 if size else None


def progress(run: RunData) -> tuple[float, float, str] | None:
    """Counts so far, counts of the whole run, and their unit. None if they are not known."""
    part = "pretrain" if run.lines.get("pretrain") else "online"
    key = "updates" if run.offline or part == "pretrain" else "env_steps"
    settings = run.config.get(part)
    whole = number(settings, key) if isinstance(settings, dict) else None
    done = [count for line in _lines(run) if (count := number(line, key[:-1])) is not None]
    return (done[-1], whole, key.replace("_", " ")) if done and whole else None


def seconds_left(run: RunData) -> float | None:
    """Expected seconds to the end at the speed of the newest lines of this session. None if it is not known."""
    found = progress(run)
    if found is None:
        return None
    done, whole, unit = found
    key = unit.replace(" ", "_")[:-1]
    points = [
        (w, n) for line in _lines(run)[-RATE:] if (w := number(line, "wall")) is not None and (n := number(line, key)) is not None
    ]
    start = max(
        (i for i in range(1, len(points)) if points[i][0] < points[i - 1][0]), default=0
    )  # the clock of a session begins at 0
    (first, low), (last, high) = points[start], points[-1]
    return (whole - done) * (last - first) / (high - low) if high > low and last > first else None


def _lines(run: RunData) -> list[dict[str, object]]:
    """Lines that count: of training, or before the first update the episodes of the prefill."""
    return next((run.lines[kind] for kind in ("train", "pretrain", "episode") if run.lines.get(kind)), [])
