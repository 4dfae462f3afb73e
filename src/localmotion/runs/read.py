"""Read run directories. Plain files describe a run, so a report needs no service and no training code.

    RUN/config.json        settings, a nested dict with at least method, stage (pretrain, finetune, train, ...), preset,
                           seed and env
    RUN/command.txt        the command that made it
    RUN/environment.json   versions, device, threads, precision, GL backend
    RUN/status.json        {"state": "running" | "finished" | "interrupted" | "failed", ...}
    RUN/metrics.jsonl      one JSON object per line, with "kind": train, episode, eval, pretrain, heldout
    RUN/random.json        an "eval" line of the uniform random policy, if it was measured
    RUN/media/             pictures, videos and arrays written during the run

A run needs config.json or metrics.jsonl. Other missing or damaged files are reported in `RunData.notices`. A killed run
may leave an incomplete last line; it is counted and skipped.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from localmotion.errors import CheckpointError
from localmotion.files import MAX_TEXT, one_line, parse_json, read_bytes, refuse_links

MAX_METRICS = 1 << 28
"""Largest metrics.jsonl that is read, in bytes. The longest runs so far wrote 30 MB."""
MAX_LINE = 1 << 20
"""Longest line of metrics.jsonl that is read, in bytes."""
Floats = NDArray[np.float64]
Line = dict[str, Any]

_ERRORS = ("model", "zero", "frame_mean", "nearest_time", "ratio_best", "ratio_zero", "ratio_frame_mean", "ratio_nearest_time")
FORMER_KEYS = {"loss/mae": "loss/masked", **{f"mae/{name}": f"masked/{name}" for name in _ERRORS}}
"""Names of metrics in runs of earlier versions, and their names today. A run that was resumed may have lines of both."""
FORMER_MEDIA = {"mae_heldout.npz": "masked_heldout.npz"}
"""The same for files of RUN/media."""


def names(paths: Sequence[Path]) -> list[str]:
    """Short names of runs: the last parts of each path that no other path ends in, and a parent beside a bare number."""
    tails = [[path.parts[-depth:] for depth in range(1, len(path.parts) + 1)] or [(str(path),)] for path in paths]
    taken = Counter(tail for path in tails for tail in path)

    def short(path: list[tuple[str, ...]]) -> str:
        clear = (tail for tail in path if taken[tail] == 1 and not (len(tail) == 1 and tail[0].isdecimal()))
        return "/".join(next(clear, path[-1])).replace("//", "/")

    return [short(path) for path in tails]


@dataclass(frozen=True)
class RunData:
    """One run directory in memory. ``lines``: lines by kind, in file order.

    ``notices``: sentences about missing files.
    """

    path: Path
    config: dict[str, Any]
    command: str
    environment: dict[str, Any]
    status: dict[str, Any]
    random: dict[str, Any]
    """Score of the uniform random policy in the run's environment. Empty if it was not measured."""
    lines: dict[str, list[Line]]
    bad_lines: int
    """Number of unreadable lines of metrics.jsonl: cut by a kill, damaged, or without a "kind"."""
    notices: tuple[str, ...]
    shown: str = ""
    """Its name beside other runs, from `names`."""

    @property
    def name(self) -> str:
        return self.shown or names([self.path])[0]

    @property
    def method(self) -> str:
        return str(self.setting("method", "unknown method"))

    @property
    def stage(self) -> str:
        return str(self.setting("stage", "unknown stage"))

    @property
    def preset(self) -> str:
        return str(self.setting("preset", "") or "")

    @property
    def env(self) -> str:
        return str(self.setting("env", "") or "")

    @property
    def offline(self) -> bool:
        """Whether it learned from logged episodes; its evaluations then count updates, not env steps."""
        return bool(self.setting("data", "")) and "train" in self.lines and not any("env_step" in x for x in self.lines["train"])

    @property
    def labels(self) -> int | None:
        """Labelled transitions that a run on logged episodes learned from. None for other runs, and if the number is not known."""
        if not self.offline:
            return None
        found = self.environment.get("transitions") or self.setting("labels")
        return found if isinstance(found, int) and not isinstance(found, bool) and found > 0 else None

    @property
    def seed(self) -> int | None:
        value = self.setting("seed")
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    @property
    def state(self) -> str:
        return str(self.status.get("state", "unknown"))

    @property
    def finished(self) -> bool:
        """Whether it has come to its end. Only then its last evaluation is a result."""
        return self.state == "finished"

    @property
    def label(self) -> str:
        """The run's label in its study, "" outside a study."""
        return str(self.config.get("label", "") or "")

    @property
    def checkpoint(self) -> str:
        """The run or file with the initial weights, "" for a run from scratch."""
        return str(self.setting("checkpoint", "") or "")

    def setting(self, name: str, default: Any = None) -> Any:
        """A setting by the last part of its name.

        If it occurs several times, the first in a breadth-first search counts.
        """
        level: list[Mapping[str, Any]] = [self.config]
        while level:
            for values in level:
                if name in values:
                    return values[name]
            level = [v for values in level for v in values.values() if isinstance(v, Mapping)]
        return default

    def keys(self, kind: str) -> list[str]:
        """Names of the fields that hold a number in any line of this kind, sorted."""
        return sorted({k for line in self.lines.get(kind, ()) for k, v in line.items() if is_number(v)})

    def every(self, kind: str, key: str, x: str = "env_step") -> tuple[Floats, Floats]:
        """``key`` against ``x`` of each line of one kind that has both: two (n,) vectors, x never decreases.

        Several lines may have one x: parallel environments end episodes at the same env step. A resumed run may write some lines again; the
        later ones replace the earlier ones from their x on (`superseded_by_none`). Non-finite values stay, as NaN or infinity.
        """
        lines = [line for line in self.lines.get(kind, ()) if number(line, x) is not None and is_number(line.get(key))]
        walls = [line["wall"] if is_number(line.get("wall")) else np.nan for line in lines]
        rows = [(line[x], line[key], wall) for line, wall in zip(lines, walls, strict=True)]
        xs, ys, clock = np.array(rows, dtype=np.float64).reshape(-1, 3).T
        keep = superseded_by_none(xs, clock)
        return xs[keep], ys[keep]

    def series(self, kind: str, key: str, x: str = "env_step") -> tuple[Floats, Floats]:
        """As `every`, with one value for each x, that of its last line: x strictly increasing."""
        xs, ys = self.every(kind, key, x)
        last = np.append(xs[1:] > xs[:-1], True)[: len(xs)]
        return xs[last], ys[last]

    def last(self, kind: str) -> Line | None:
        """The newest line of a kind, None if there is none."""
        lines = self.lines.get(kind)
        return lines[-1] if lines else None

    def wall_seconds(self) -> float:
        """Wall time up to the last training line, summed over sessions (a resumed run starts its clock at zero)."""
        total = 0.0
        for kind in ("pretrain", "train"):
            walls = [wall for line in self.lines.get(kind, ()) if (wall := number(line, "wall")) is not None]
            total += sum(now - then if now >= then else now for then, now in zip([0.0, *walls], walls, strict=False))
        return total

    def media(self, pattern: str) -> list[Path]:
        """Files of RUN/media that match a glob pattern, sorted by name.

        A file that an earlier version named differently (`FORMER_MEDIA`) matches as well, unless the run has it under today's name.
        """
        folder = self.path / "media"
        found = {p.name: p for p in folder.glob(pattern) if p.is_file()} if folder.is_dir() else {}
        for former, name in FORMER_MEDIA.items():
            if fnmatch(name, pattern) and name not in found and (folder / former).is_file():
                found[name] = folder / former
        return [found[name] for name in sorted(found)]


def superseded_by_none(xs: Floats, walls: Floats) -> NDArray[np.bool_]:
    """(n,) True where no later session has an entry with an equal or smaller x, so x never decreases over these entries.

    ``xs``, ``walls`` (n,): finite counts, and seconds since the session began (NaN: not known). A session begins where one of them falls.
    """
    falls = (xs[1:] < xs[:-1]) | (walls[1:] < walls[:-1])
    session = np.append(0, np.cumsum(falls))[: len(xs)]
    least = np.append(np.minimum.accumulate(xs[::-1])[::-1], np.inf)  # of this entry and all later ones
    return xs < least[np.searchsorted(session, session, side="right")]


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether a JSON value is a number that fits a float (true for NaN and infinities, false for 10**400)."""
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63)


def number(line: Mapping[str, Any] | None, key: str) -> float | None:
    """The finite number under ``key`` of a line, or None."""
    value = line.get(key) if line else None
    return float(value) if is_number(value) and np.isfinite(value) else None


def count_of(line: Mapping[str, Any], key: str) -> int:
    """A counter of a line as an integer, 0 if it has none."""
    return int(number(line, key) or 0)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; lists and empty dicts stay values."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _read_dict(path: Path, notices: list[str]) -> dict[str, Any]:
    if not path.exists():
        notices.append(f"{path.name} is missing.")
        return {}
    try:
        value = parse_json(read_bytes(path, MAX_TEXT))
    except (OSError, ValueError) as error:
        notices.append(f"{path.name} cannot be read ({one_line(error)}).")
        return {}
    if not isinstance(value, dict):
        notices.append(f"{path.name} does not hold an object.")
        return {}
    return value


def _read_text(path: Path, notices: list[str]) -> str:
    try:
        return read_bytes(path, MAX_TEXT).decode(errors="replace").strip()
    except FileNotFoundError:
        notices.append(f"{path.name} is missing.")
    except (OSError, ValueError) as error:
        notices.append(f"{path.name} cannot be read ({one_line(error)}).")
    return ""


class Tail:
    """Lines that were appended to a metrics file since the last look. ``path`` need not exist yet."""

    def __init__(self, path: Path) -> None:
        self.path, self.offset = path, 0

    def new(self, incomplete: bool = False) -> Iterator[Line | None]:
        """Yield the new lines as dicts, with the names of today.

        None for a line longer than `MAX_LINE`, or without an object with a "kind". A last line without its end is left for the next
        look, or with ``incomplete`` yielded.
        """
        if not self.path.is_file():
            return
        with self.path.open("rb") as file:
            file.seek(self.offset)
            while raw := file.readline(MAX_LINE):
                long = len(raw) == MAX_LINE and not raw.endswith(b"\n")
                while long and (rest := file.readline(MAX_LINE)):
                    raw = rest
                    if rest.endswith(b"\n"):
                        break
                if not raw.endswith(b"\n") and not incomplete:
                    return
                self.offset = file.tell()
                if long or raw.strip():
                    yield None if long else _parsed(raw)


def _parsed(raw: bytes) -> Line | None:
    try:
        line: Any = json.loads(raw)
    except (ValueError, RecursionError):  # also UnicodeDecodeError, if a line is cut inside a character
        return None
    named = isinstance(line, dict) and isinstance(line.get("kind"), str)
    return {FORMER_KEYS.get(key, key): value for key, value in line.items()} if named else None


class Log:
    """metrics.jsonl in memory: lines by kind, and the number of unreadable ones. `more` reads what was appended."""

    def __init__(self, path: Path) -> None:
        self.tail = Tail(path)
        self.lines: dict[str, list[Line]] = {}
        self.bad = 0

    def more(self, incomplete: bool) -> None:
        """``incomplete``: a last line without its end counts, too."""
        for line in self.tail.new(incomplete):
            if line is None:
                self.bad += 1
            else:
                self.lines.setdefault(line["kind"], []).append(line)


def _read_log(log: Log, notices: list[str], live: bool) -> None:
    path = log.tail.path
    if not path.is_file():
        notices.append("metrics.jsonl is missing: the run wrote no numbers yet.")
    elif path.stat().st_size > MAX_METRICS:
        notices.append(f"metrics.jsonl has {path.stat().st_size / 2**20:.0f} MB, more than a report reads; it is left out.")
    else:
        log.more(incomplete=not live)
    if log.bad:
        notices.append(f"metrics.jsonl has {log.bad} unreadable line{'s' * (log.bad > 1)}, left out (a killed run leaves one).")


def _count_failures(lines: Mapping[str, list[Line]]) -> None:
    """Success is 0 where a line has none and another has one: some environments say it only where it is true."""
    for kind, name in (("eval", "success_rate"), ("episode", "success")):
        found = lines.get(kind, [])
        if any(name in line for line in found):
            for line in found:
                line.setdefault(name, 0.0)


def read_run(path: str | Path, log: Log | None = None) -> RunData:
    """Read a run directory.

    Raises CheckpointError if ``path`` is not a directory, has neither config.json nor metrics.jsonl, or has links that
    lead out of it (a shared report must not contain other files of the user). Other missing or damaged files are
    reported in `RunData.notices`. ``log``: what was read of a run that still writes; only what is new is read then.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such run directory; give the folder that --run named")
    metrics = path / "metrics.jsonl"
    if not metrics.is_file() and not (path / "config.json").is_file():
        raise CheckpointError(f"{path}: not a run directory: it has neither config.json nor metrics.jsonl")
    notices: list[str] = []
    refuse_links(path, CheckpointError)
    live, log = log is not None, log or Log(metrics)
    _read_log(log, notices, live)
    _count_failures(log.lines)
    return RunData(
        path=path,
        config=_read_dict(path / "config.json", notices),
        command=_read_text(path / "command.txt", notices),
        environment=_read_dict(path / "environment.json", notices),
        status=_read_dict(path / "status.json", notices),
        random=_read_dict(path / "random.json", notices) if (path / "random.json").exists() else {},
        lines=log.lines,
        bad_lines=log.bad,
        notices=tuple(notices),
    )
