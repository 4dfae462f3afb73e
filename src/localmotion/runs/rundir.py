"""Write a run directory: settings, command, versions, metrics, status, checkpoints, media."""

from __future__ import annotations

import contextlib
import json
import platform
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localmotion import ranks
from localmotion.config import RunConfig, leaves, to_dict
from localmotion.console import errors, say
from localmotion.errors import CheckpointError, ConfigError, LocalmotionError
from localmotion.files import LOCK, check_output, disk_fault, locked, parse_json, read_json, refuse_links, write_json
from localmotion.runs.settings import from_dict
from localmotion.runs.source import commit

if TYPE_CHECKING:
    from localmotion.video.store import ClipStore

# Settings that may differ when a run continues. They change its length and its machine, but not what it computes
# (except for rounding). A store may lie at another place, but must hold the same clips (`check_stores`).
MAY_CHANGE = {
    "pretrain.updates",
    "online.env_steps",
    "online.updates",
    "device",
    "threads",
    "cuda_graph",
    "compile",
    "data",
    "rehearsal.data",
    "checkpoint",
    "label",
    "online.replay_storage",
} | {
    f"{part}.{name}"
    for part in ("pretrain", "online")
    for name in ("log_every", "eval_every", "save_every", "eval_episodes", "eval_batches")
}


def versions() -> dict[str, str]:
    """Versions of the packages that affect a result."""
    packages = ["localmotion", "torch", "numpy", "opencv-python-headless", "av", "gymnasium", "mujoco", "dm_control", "metaworld"]
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def begun(path: Path) -> bool:
    """Whether the run in ``path`` has played or learned anything. A file that cannot be read counts as yes."""
    if any((path / "checkpoints").glob("[0-9]*/COMPLETE")):
        return True
    status, metrics = path / "status.json", path / "metrics.jsonl"
    try:
        if status.exists() and _counts(read_json(status, CheckpointError, "")):
            return True
        if not metrics.is_file():
            return metrics.exists()
        with metrics.open("rb") as lines:
            return any(_counts(parse_json(line)) for line in lines)
    except (LocalmotionError, OSError, ValueError, TypeError, AttributeError):
        return True


def _counts(line: Mapping[str, Any]) -> bool:
    """Whether a status or a line of the log has counted an agent step or an update."""
    return any(line.get(name, 0) > 0 for name in ("agent_step", "update"))


def earlier(path: Path) -> Path | None:
    """``path`` if a run that has begun goes on there. None: nothing of what is there binds the command (`begun`)."""
    return path if begun(path) else None


def read_environment(path: Path | None) -> dict[str, Any]:
    """Read environment.json of a run: its machine, and the decisions at its start. Empty if there is none yet.

    Raises CheckpointError if it cannot be read.
    """
    if path is None:
        return {}
    file = path / "environment.json"
    return read_json(file, CheckpointError, "restore it from where the run was made") if file.exists() else {}


def check_stores(path: Path, stores: Mapping[str, ClipStore]) -> None:
    """Raise ConfigError if the run that has begun in ``path`` learned from other clips than those of ``stores``, by their setting.

    Batches are drawn from the clips of a store by their numbers, so with other clips a run that goes on is not the run that was stopped.
    A run that began while shards of its store were missing goes on with those that are there now, and says so. Runs of earlier versions
    did not note their clips; nothing is checked for them.
    """
    known = read_environment(earlier(path)).get("stores", {})
    for name, store in stores.items():
        before, now = known.get(name), store.contents()
        if before and before != now:
            held = [f"{found.get('clips', 0):,} clips with {found.get('frames', 0):,} frames" for found in (before, now)]
            what = f"other {held[1]}" if held[0] == held[1] else f"{held[1]}, and then it had {held[0]}"
            if before.get("missing"):
                say(f"{store.path}: {what}: from here on, batches are others than those of a run that was not stopped")
                continue
            raise ConfigError(
                f"{store.path}: holds other clips than those that the run {path} learned from ({what}); give {name} with the same"
                f" clips, or another --run to begin with these"
            )


@contextlib.contextmanager
def claimed(path: Path, what: str = "run") -> Iterator[None]:
    """Lock the directory ``path`` of a run (or of a study) for this process while the context is open.

    The directory is created if needed. If it was created here and stays empty, it is removed at the end.

    Only rank 0 of a run locks it. Raises CheckpointError if another process holds the lock, or if nothing can be written there.
    """
    if not ranks.leads():
        yield
        return
    check_output(path, CheckpointError, folder=True)
    made = not path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be made ({error.strerror or error}); choose another place") from error
    refusal = f"{path}: this {what} is running already; wait for it, or choose another place"
    with locked(path / LOCK, refusal, CheckpointError):
        try:
            yield
        finally:
            if made and [entry.name for entry in path.iterdir()] == [LOCK]:
                with contextlib.suppress(OSError):
                    (path / LOCK).unlink()
                    path.rmdir()


@contextlib.contextmanager
def _writing(file: Path) -> Iterator[None]:
    """Raise CheckpointError if ``file`` of a run cannot be written inside this context, as on a full disk."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(disk_fault(error, file)) from error


def _untouched(path: Path) -> bool:
    """Whether nothing is in a directory but what a run makes before its settings: a kill or a full disk may end it there."""
    made = (
        entry.name in ("media", "checkpoints") and entry.is_dir() and not any(entry.iterdir())
        for entry in path.iterdir()
        if entry.name not in (LOCK, "config.json.tmp")
    )
    return all(made)


class RunDir:
    """Creates a run directory, or reopens one with the same settings to continue it.

    A run that has not begun (`begun`) takes the settings of the new command. Raises ConfigError if the directory holds a
    run that has begun with other settings. Raises CheckpointError if it holds something
    else, or links that lead out of it (the run writes files with known names, which such links could redirect).
    """

    def __init__(self, path: Path, run: RunConfig) -> None:
        self.path = path
        config = to_dict(run)
        if path.exists() and not path.is_dir():
            raise CheckpointError(f"{path}: is a file; choose another --run")
        if path.exists() and not _untouched(path):
            if not (path / "config.json").exists():
                raise CheckpointError(f"{path}: not empty and not a run (no config.json); choose another --run")
            refuse_links(path, CheckpointError)
            try:
                self._compare(read_json(path / "config.json", CheckpointError, "choose another --run"), run)
            except ConfigError:
                if begun(path):
                    raise
                say(f"{path}: nothing was played or learned there with its other settings; it gets those of this command")
        with _writing(path / "config.json"):  # first: it says that this is a run
            path.mkdir(parents=True, exist_ok=True)
            write_json(path / "config.json", config)
        with _writing(path):
            (path / "media").mkdir(exist_ok=True)
            (path / "checkpoints").mkdir(exist_ok=True)
        with _writing(path / "command.txt"), (path / "command.txt").open("a") as file:
            file.write(shlex.join(["localmotion", *sys.argv[1:]]) + "\n")
        self.metrics_path = path / "metrics.jsonl"
        self.began = time.time()

    def _compare(self, old: Mapping[str, Any], run: RunConfig) -> None:
        """Raise ConfigError unless the settings are equal.

        A setting that an older version lacks counts as its default.
        """
        try:
            kept = from_dict(old)
            before, now = ({**dict(leaves(x)), "recipe": to_dict(x)["recipe"]} for x in (kept, run))
            if not kept.recipe:  # older versions did not save the checkpoint's recipe
                now["recipe"] = before["recipe"]
        except ConfigError as error:
            raise ConfigError(f"{self.path}: holds a run of other settings ({error}); choose another --run") from error
        before, now = (json.loads(json.dumps(values, default=str)) for values in (before, now))
        differ = [
            f"{key} ({before.get(key)!r:.200} there, {now.get(key)!r:.200} now)"
            for key in sorted(set(before) | set(now))
            if before.get(key) != now.get(key) and key not in MAY_CHANGE
        ]
        if differ:
            shown = ", ".join(differ[:5]) + (f" and {len(differ) - 5} more" if len(differ) > 5 else "")
            raise ConfigError(f"{self.path}: holds a run of other settings: {shown}; choose another --run or the same settings")

    def environment(self, values: Mapping[str, Any]) -> None:
        """Save versions, the commit and the decisions at the start (device, GL, environment description)."""
        with _writing(self.path / "environment.json"):
            write_json(self.path / "environment.json", {"versions": versions(), "commit": commit(), **values})

    def status(self, state: str, **more: Any) -> None:
        """state: running, finished, interrupted or failed."""
        with _writing(self.path / "status.json"):
            write_json(self.path / "status.json", {"state": state, "time": time.time(), **more})

    def ended(self, state: str, **more: Any) -> None:
        """`status` of a run that an error or a signal ends. Never raises: a full disk must not hide what ended the run."""
        try:
            self.status(state, **more)
        except LocalmotionError as error:
            errors.print(f"warning: {error}", markup=False)

    def log(self, kind: str, **values: Any) -> None:
        """Append one line to metrics.jsonl."""
        line = {"kind": kind, "wall": round(time.time() - self.began, 3), **values}
        with _writing(self.metrics_path), self.metrics_path.open("a") as file:
            file.write(json.dumps(line, default=float) + "\n")

    def metrics_offset(self) -> int:
        """Length of metrics.jsonl in bytes, kept with a checkpoint."""
        return self.metrics_path.stat().st_size if self.metrics_path.exists() else 0

    def truncate_metrics(self, offset: int) -> None:
        """Drop lines that follow the checkpoint from which the run resumes. The run writes them again."""
        if self.metrics_path.exists() and self.metrics_path.stat().st_size > offset:
            with _writing(self.metrics_path), self.metrics_path.open("r+b") as file:
                file.truncate(offset)


class _Unwritten(RunDir):
    """The directory of a run that rank 0 writes, as its other ranks see it: nothing is written."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def environment(self, values: Mapping[str, Any]) -> None:
        pass

    def status(self, state: str, **more: Any) -> None:
        pass

    def log(self, kind: str, **values: Any) -> None:
        pass

    def metrics_offset(self) -> int:
        return 0

    def truncate_metrics(self, offset: int) -> None:
        pass


def run_dir(path: Path, run: RunConfig) -> RunDir:
    """The `RunDir` of this rank. Only that of rank 0 writes anything."""
    return RunDir(path, run) if ranks.leads() else _Unwritten(path)
