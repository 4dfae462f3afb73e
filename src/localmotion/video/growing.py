"""A shard that one process makes in a folder of its own, video by video, and that outlives a kill of the process.

The folder is `shards/00007.making-HOST-PID-RANDOM`. Whoever makes the same shard has another folder; the first that is renamed to
`shards/00007` counts, and the others are dropped. So there are no locks. A journal in the folder has one line for each finished video. A
process that makes the shard again copies the finished videos of a folder that was left behind, and compares their SHA-256. It copies,
because the other process may live on a machine that it cannot see: both then write their own files only.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
import socket
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, Any

from localmotion.errors import StoreError
from localmotion.files import parse_json
from localmotion.video.shard_files import ShardFiles, publish
from localmotion.video.shards import Clip, alive, write_error
from localmotion.video.writer import ClipStoreWriter

MAKING = ".making-"
"""Part of the names of folders of unfinished shards."""
_JOURNAL = "journal.jsonl"
_OPEN: set[Path] = set()  # folders in which this process makes a shard
_LOST = (errno.ENOENT, errno.ESTALE)


class GrowingShard:
    """A shard in the making. A context: it closes its files, and leaves the folder to be continued unless `publish` was called."""

    def __init__(self, writer: ClipStoreWriter, index: int, names: Sequence[str]) -> None:
        """``names``: ids of its videos, in the order in which they will be added."""
        self.writer, self.index, self.names = writer, index, names
        self.final = writer.path / "shards" / f"{index:05d}"
        self.folder = self.final.with_name(
            f"{self.final.name}{MAKING}{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        )
        self.results: list[dict[str, Any]] = []
        """`record` and `rejected` of each finished video."""
        self._files = ShardFiles(self.folder, writer.specs)
        self._journal: IO[bytes]
        self._kept = 0  # clips of the finished videos

    def __enter__(self) -> GrowingShard:
        with self._errors():
            _OPEN.add(self.folder)
            self.folder.mkdir()
            self._files.__enter__()
            self._journal = (self.folder / _JOURNAL).open("wb")
        return self

    def __exit__(self, *error: object) -> None:
        _OPEN.discard(self.folder)
        with contextlib.ExitStack() as stack:
            stack.callback(self._files.__exit__)
            stack.callback(self._journal.close)

    @property
    def clips(self) -> int:
        return len(self._files.clips)

    @property
    def frames(self) -> int:
        return self._files.frames

    def add(self, clip: Clip) -> None:
        """Append a clip of the next video of `names`."""
        self.writer.check(clip)
        with self._errors():
            self._files.add(clip)

    def drop_video(self) -> None:
        """Remove the clips of the unfinished video."""
        with self._errors():
            self._files.back()

    def end_video(self, record: dict[str, Any], rejected: dict[str, str] | None) -> None:
        """Finish the next video of `names`. If it is rejected, its clips are removed."""
        if rejected:
            self.drop_video()
        with self._errors():
            self._log({"record": record, "rejected": rejected}, self._files.digests())

    def _log(self, result: dict[str, Any], digests: dict[str, str]) -> None:
        entry = {**result, "clips": self._files.clips[self._kept :], "sha256": digests}
        self._files.mark()
        self._kept = self.clips
        self.results.append(result)
        self._journal.write(json.dumps(entry).encode() + b"\n")
        self._journal.flush()

    def take_over(self, leftovers: Iterable[Path], unchanged: Callable[[dict[str, Any]], bool]) -> None:
        """Copy the finished videos of the folder that has most of them. ``unchanged`` says of a record whether its video is still the same.

        Stops at the first video that has changed or whose arrays have another SHA-256.
        """
        found = max(
            (_read_journal(folder) for folder in leftovers if not _in_use(folder)), default=None, key=lambda pair: len(pair[1])
        )
        if found is None:
            return
        folder, entries = found
        with contextlib.ExitStack() as stack, contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):
            files = {name: stack.enter_context((folder / spec.file).open("rb")) for name, spec in self.writer.specs.items()}
            for entry, name in zip(entries, self.names, strict=False):
                if entry["record"]["id"] != name or not unchanged(entry["record"]):
                    break
                with self._errors():
                    for clip in entry["clips"]:
                        self._files.append(
                            clip,
                            {key: file.read(clip["frames"] * self.writer.specs[key].frame_bytes) for key, file in files.items()},
                        )
                    if self._files.digests() != entry["sha256"]:
                        break
                    self._log({"record": entry["record"], "rejected": entry["rejected"]}, entry["sha256"])
        self.drop_video()

    def publish(self) -> bool:
        """Make it a shard of the store. False if another process was faster."""
        with self._errors():
            rejected = [result["rejected"] for result in self.results if result["rejected"]]
            self.writer.check_ids(self.index, self._files.clips, rejected)
            self._journal.close()
            (self.folder / _JOURNAL).unlink()
            self._files.complete(rejected, [result["record"] for result in self.results])
            first = publish(self.folder, self.final)
        if not first:
            shutil.rmtree(self.folder, ignore_errors=True)
        return first

    @contextlib.contextmanager
    def _errors(self) -> Any:
        try:
            yield
        except OSError as error:
            if error.errno in _LOST and not self.folder.exists():
                raise StoreError(f"{self.folder}: was removed; another process makes shard {self.index:05d} now") from error
            raise write_error(self.writer.path, f"shard {self.index:05d}", error) from error


def left_behind(store: Path) -> dict[int, list[Path]]:
    """The folders of unfinished shards, by the shard's number."""
    found: dict[int, list[Path]] = {}
    with contextlib.suppress(FileNotFoundError), os.scandir(store / "shards") as entries:
        for entry in entries:
            number, mark, _ = entry.name.partition(MAKING)
            if mark and number.isdigit():
                found.setdefault(int(number), []).append(Path(entry.path))
    return found


def remove_left_behind(folders: Iterable[Path]) -> None:
    """Remove folders of unfinished shards, but not of living processes of this machine."""
    for folder in folders:
        if not _in_use(folder):
            shutil.rmtree(folder, ignore_errors=True)


def _in_use(folder: Path) -> bool:
    host, _, pid = folder.name.partition(MAKING)[2].rpartition("-")[0].rpartition("-")
    return folder in _OPEN or (host == socket.gethostname() and pid.isdigit() and alive(int(pid)))


def _read_journal(folder: Path) -> tuple[Path, list[dict[str, Any]]]:
    """The complete lines of a journal."""
    entries = []
    with contextlib.suppress(OSError, ValueError), (folder / _JOURNAL).open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            entries.append(parse_json(line))
    return folder, entries
