"""Several processes, also on several machines, extract into one store. They share one plan, and each shard is claimed by one of them.

Their shared files are in `STORE/unfinished`; the last process removes them:

    plan.lock           held while a process joins or leaves
    plan.json           the work to do: written by the first process, followed by the others
    process-HOST-PID-N  held by each process as long as it lives
    00007.lock          held by the process that makes shard 7

The kernel frees the locks of a process that dies. On a file system without locks no process sees the others.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from localmotion.errors import StoreError
from localmotion.files import Lock, read_json
from localmotion.video.shards import write_atomic, write_error

_LIMIT = 1 << 28  # bytes of a plan
_NUMBERS = itertools.count()  # of the extractions of this process
_WAIT = 0.1  # seconds between two checks for processes that joined or left


class Work:
    """The shared plan of the processes that extract into a store, and the shards that this process has claimed."""

    def __init__(self, folder: Path, plan: dict[str, Any]) -> None:
        self.folder, self.plan = folder, plan
        self.finished = False
        """Set when the whole plan is done. Results that still exist are then leftovers."""
        self._claims: dict[int, Lock] = {}

    def claim(self, index: int) -> bool:
        """Claim a shard. False if another process has it. Then check whether the shard exists: another process may just have written it."""
        self.folder.mkdir(exist_ok=True)
        lock = Lock(self.folder / f"{index:05d}.lock")
        if not lock.taken:
            lock.release()
            return False
        self._claims[index] = lock
        return True

    def done(self, index: int) -> None:
        """Release a shard that is written."""
        lock = self._claims.pop(index)
        lock.path.unlink(missing_ok=True)  # a process that opened the file before, and locks it now, finds the shard written
        lock.release()

    def leave(self) -> None:
        """Release the shards that this process claimed and did not finish."""
        for lock in self._claims.values():
            lock.release()
        self._claims.clear()


@contextmanager
def shared_work(store: Path, terms: dict[str, Any], make_plan: Callable[[], dict[str, Any]]) -> Iterator[Work]:
    """Join the processes that extract into a store, or start alone with `make_plan()`, a JSON-able dict.

    Raises StoreError if others work with other `terms` (JSON-able; e.g. another folder of videos). The message names one of them.
    """
    folder = store / "unfinished"
    name = f"process-{socket.gethostname()}-{os.getpid()}-{next(_NUMBERS)}"
    try:
        with _joining(folder):
            others = _others(folder)
            if others:
                found = read_json(
                    folder / "plan.json", StoreError, "wait for the other process and run the command again", limit=_LIMIT
                )
                _compare(store, others[0], found["terms"], terms)
            else:
                found = {"terms": terms, "plan": make_plan()}
                write_atomic(folder / "plan.json", json.dumps(found))
            mine = Lock(folder / name)
        work = Work(folder, found["plan"])
    except OSError as error:
        raise write_error(store, "the plan of the extraction", error) from error
    try:
        yield work
    finally:
        work.leave()
        with _joining(folder, work):
            mine.path.unlink(missing_ok=True)
            mine.release()


@contextmanager
def _joining(folder: Path, work: Work | None = None) -> Iterator[None]:
    """Context that holds the lock for joining or leaving. The last process to leave removes the shared files, and finished results."""
    lock: Lock | None = None
    while lock is None:
        with suppress(FileNotFoundError):  # the last process removes the folder in between
            folder.mkdir(exist_ok=True)
            lock = Lock(folder / "plan.lock")
            if not lock.taken or not _in_place(lock):
                lock.release()
                lock = None
                time.sleep(_WAIT)
    try:
        yield
    finally:
        if not _others(folder):
            shared = [folder / "plan.json", *folder.glob("*.lock")]
            for file in folder.iterdir() if work and work.finished else shared:
                file.unlink(missing_ok=True)
            with suppress(OSError):  # it still holds results, which are kept
                folder.rmdir()
        lock.release()


def _in_place(lock: Lock) -> bool:
    """Whether the path of a lock still refers to the locked file."""
    try:
        have, there = os.fstat(lock.handle), os.stat(lock.path)
    except FileNotFoundError:
        return False
    return (have.st_dev, have.st_ino) == (there.st_dev, there.st_ino)


def _others(folder: Path) -> list[str]:
    """The running processes; removes the marks of dead ones."""
    alive = []
    for path in sorted(folder.glob("process-*")):
        lock = Lock(path)
        if lock.taken:
            path.unlink(missing_ok=True)
        else:
            alive.append(lock.holder())
        lock.release()
    return alive


def _compare(store: Path, holder: str, have: dict[str, Any], want: dict[str, Any]) -> None:
    for key in want:
        if have.get(key) != want[key]:
            raise StoreError(
                f"{store}: {holder} is extracting into it with {key} {have.get(key)}, this command has {want[key]}; "
                "wait until it ends, or use the same value or another --out"
            )
