"""Read small text and JSON files that may come from somebody else, with limits on size and depth. Also locks and links.

All metadata of run directories and clip stores is read here. A file is refused with one line if it is too large, not a
regular file (a pipe would block the reader), not a JSON object, or nested deeper than `MAX_DEPTH`.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from localmotion.errors import LocalmotionError

MAX_TEXT = 16 << 20
"""Largest text or JSON file that is read, bytes. A shard's index of 64 clips has 0.1 MB, a state of 20,000 episodes 0.2 MB."""
MAX_DEPTH = 32
"""Deepest nesting of a JSON or YAML value. Files of this package use at most six levels."""
MAX_VALUES = 4_000_000
"""Most values in one JSON or YAML value. Each use of a YAML alias counts."""


def one_line(error: object, limit: int = 300) -> str:
    """Text of an error (or of a value from a file) on one line of at most ``limit`` characters, without control characters."""
    text = " ".join("".join(c if c.isprintable() else " " for c in str(error)).split())
    if not text and isinstance(error, BaseException):
        text = type(error).__name__
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def check_tree(value: Any, depth: int = MAX_DEPTH, values: int = MAX_VALUES) -> None:
    """Raise ValueError for a value of dicts and lists that is nested too deep (or in itself) or holds too many values.

    Code that traverses such a value later (comparing, flattening, writing JSON) then terminates within Python's stack.
    """
    level, count = [value], 0
    for _ in range(depth + 1):
        inner: list[Any] = []
        for item in level:
            if isinstance(item, (dict, list, tuple)):
                inner.extend(item.values() if isinstance(item, dict) else item)
                count += len(item)
                if count > values:
                    raise ValueError(f"holds more than {values:,} values")
        if not inner:
            return
        level = inner
    raise ValueError(f"is nested deeper than {depth} levels")


def read_bytes(path: Path, limit: int) -> bytes:
    """Content of a regular file of at most ``limit`` bytes. Raises OSError (also for a pipe or device) or ValueError."""
    # Non-blocking: opening a pipe for reading would block until somebody writes.
    with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("is not a regular file")
        if status.st_size > limit:
            raise ValueError(f"has {status.st_size / 2**20:.1f} MB, more than the {limit / 2**20:.0f} MB allowed for such a file")
        return file.read(limit + 1)[:limit]


def parse_json(text: str | bytes, values: int = MAX_VALUES) -> Any:
    """A JSON value. Raises ValueError for invalid JSON, a value nested too deep, or more than ``values`` values."""
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError(f"is nested deeper than {MAX_DEPTH} levels") from error
    check_tree(value, values=values)
    return value


def read_json(path: Path, error: type[LocalmotionError], fix: str, *, limit: int = MAX_TEXT) -> dict[str, Any]:
    """The JSON object in a file.

    Raises ``error`` with one line (file, cause, ``fix``) for a file that is missing, unreadable, not regular, larger
    than ``limit`` bytes, not JSON, not an object, or nested deeper than `MAX_DEPTH`.
    """
    try:
        value = parse_json(read_bytes(path, limit))
        if not isinstance(value, dict):
            raise ValueError(f"holds a {type(value).__name__}, not an object")
    except (OSError, ValueError) as cause:
        raise error(f"{path}: cannot be read ({one_line(cause)}); {fix}") from cause
    return value


def write_json(path: Path, value: Any) -> None:
    """Write JSON through a temporary file in the same folder, so that a reader never sees an incomplete file."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(json.dumps(value, indent=1, sort_keys=True, default=str) + "\n")
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG}
"""Errors of a disk that is full, not writable any more, or broken. They can hit every write, and no program can prevent them."""


def told(error: LocalmotionError | OSError) -> str:
    """The line that the command line prints for an error. Raises it again if it is an OSError that says nothing of the disk."""
    if not isinstance(error, OSError):
        return str(error)
    if error.errno not in DISK:
        raise error
    return disk_fault(error)


def disk_fault(error: OSError, file: str | Path = "") -> str:
    """One line about an error of `DISK`. ``file``: what was written, if the error does not know it (an open file has no name)."""
    place = one_line(file or error.filename or "a file")
    what = "cannot be written" if file or error.errno != errno.EIO else "cannot be read or written"
    retry = "what was complete is kept, and the same command goes on from there when the disk takes files again"
    return f"{place}: {what} ({one_line(error.strerror or error)}); {retry}"


def links_out_of(root: Path, deep: bool = True, only: Path | None = None) -> Iterator[Path]:
    """Symbolic links below ``root`` that lead out of it. None is followed. ``root`` itself may be a link.

    Not ``deep``: only those directly in it. ``only``: a folder below ``root``; this one and what is in it are looked at.
    """
    real = os.path.realpath(root)
    if only is not None and not f"{os.path.realpath(only)}{os.sep}".startswith(real + os.sep):
        yield only
        return
    folders = [os.fspath(only or root)]
    while folders:
        try:
            with os.scandir(folders.pop()) as listing:
                entries = list(listing)
        except OSError:  # no such folder, or not readable: the code that reads it raises the same error
            continue
        for entry in entries:
            if entry.is_symlink():
                target = os.path.realpath(entry.path)
                if target != real and not target.startswith(real + os.sep):
                    yield Path(entry.path)
            elif deep and entry.is_dir():
                folders.append(entry.path)


_trusted = False  # whether links out of stores and runs are followed; set by `trust_links`


def trust_links(trusted: bool = True) -> None:
    """Let `refuse_links` accept every link in this process, for the user's own stores and runs with parts elsewhere.

    Clusters and git-annex replace large files by links to other disks. The command line sets it with ``--follow-links``.
    """
    global _trusted
    _trusted = trusted


def links_trusted() -> bool:
    """Whether `trust_links` is on, for code that starts further processes of this program."""
    return _trusted


_stores: dict[str, str] = {}  # real path of a folder -> folder that its links may lead into; set by `accept_links`


def accept_links(root: Path, into: Path) -> None:
    """Let `refuse_links` accept links below ``root`` that lead into the folder ``into``, in this process.

    For the cache of a library that keeps each file once and links to it. ``into`` holds nothing else.
    """
    _stores[os.path.realpath(root)] = os.path.realpath(into)


def _in_store(root: Path, link: Path) -> bool:
    store = _stores.get(os.path.realpath(root))
    return store is not None and os.path.realpath(link).startswith(store + os.sep)


def refuse_links(
    root: Path, error: type[LocalmotionError], *, folders: bool = True, deep: bool = True, only: Path | None = None
) -> None:
    """Raise ``error`` for a symbolic link below ``root`` that leads out of it; without ``folders`` links to folders are accepted.

    ``deep`` and ``only`` as in `links_out_of`.

    A folder from somebody else must not make us show or overwrite one of the user's files through a link. Does nothing after
    `trust_links`.
    """
    if _trusted:
        return
    for path in links_out_of(root, deep, only):
        if (folders or not path.is_dir()) and not _in_store(root, path):
            raise error(
                f"{path}: is a link to a place outside of {root}; put the file itself there, "
                "or give --follow-links if the links are your own"
            )


def check_output(path: Path, error: type[LocalmotionError], *, folder: bool = False, suffixes: tuple[str, ...] = ()) -> None:
    """Raise ``error`` with one line unless ``path`` can be written. Call it before the work starts.

    Creates and removes a file in the nearest existing folder, because permission bits do not apply to every user.

    Args:
        path: a file, or with ``folder`` a directory; both may exist, and their folders need not.
        suffixes: endings that the file's name may have, lower case; empty for any.
    """
    if suffixes and path.suffix.lower() not in suffixes:
        raise error(f"{path}: must end in {' or '.join(suffixes)}")
    if os.path.isdir(path) and not folder:
        raise error(f"{path}: is a folder; give the name of a file")
    place = path if folder else path.parent
    found = next(p for p in (place, *place.parents) if os.path.lexists(p) or p == p.parent)  # the nearest existing path
    if not os.path.isdir(found):
        what = "is not a folder" if os.path.exists(found) else "is a link that leads nowhere"
        raise error(f"{path}: {what}; choose another place" if found == path else f"{path}: {found} {what}; choose another place")
    try:
        with contextlib.suppress(FileNotFoundError):
            os.lstat(path)  # fails for a name that is too long, for example
        with tempfile.TemporaryFile(dir=found):
            pass
        if os.path.exists(path) and not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except (OSError, ValueError) as cause:  # ValueError: a null byte in the name
        raise error(
            f"{path}: cannot be written ({one_line(getattr(cause, 'strerror', None) or cause)}); choose another place"
        ) from cause


LOCK = ".lock"
"""Name of the lock file of a run directory, a study or a collection; held by the process that writes there."""


class Lock:
    """A lock file: `taken` is True for the one process that holds it.

    The kernel releases it when the process ends in any way, so no cleanup is needed after a kill. The file contains the holder's host and
    pid and is not removed. On a file system without locks `taken` is True for every process.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # Do not follow a link: it may lead to another file, which would be emptied.
        self.handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0), 0o666)
        if not stat.S_ISREG(os.fstat(self.handle).st_mode):
            os.close(self.handle)
            raise OSError(errno.EINVAL, "is not a regular file")
        # A file that its holder has removed after we opened it is not a lock.
        self.taken = _flock(self.handle) and os.fstat(self.handle).st_nlink > 0
        if self.taken:
            os.ftruncate(self.handle, 0)
            os.pwrite(self.handle, f"{socket.gethostname()} {os.getpid()}\n".encode(), 0)

    def holder(self) -> str:
        """Host and pid of the process that holds it, for a message."""
        host, _, pid = os.pread(self.handle, 300, 0).decode(errors="replace").strip().rpartition(" ")
        return f"process {one_line(pid, 20)} on {one_line(host, 100)}" if host else "another process"

    def release(self) -> None:
        """Release the lock. Does nothing the second time."""
        if self.handle >= 0:
            os.close(self.handle)
            self.handle, self.taken = -1, False


@contextlib.contextmanager
def locked(path: Path, refusal: str, kind: type[LocalmotionError]) -> Iterator[None]:
    """Context that holds the lock ``path``.

    Raises ``kind`` with "``refusal`` (process PID on HOST)" if another process holds it, and if the file cannot be opened.
    """
    try:
        lock = Lock(path)
    except OSError as error:
        raise kind(f"{path}: cannot be opened as a lock ({one_line(error.strerror or error)}); remove it") from error
    try:
        if not lock.taken:
            raise kind(f"{refusal} ({lock.holder()})")
        yield
    finally:
        lock.release()


def _flock(handle: int) -> bool:
    """Whether this process holds the lock now. Also True if there are no locks."""
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # this file system has no locks
        return True
    return True
