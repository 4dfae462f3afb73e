"""Finished clips of incomplete shards, one file each, so an interruption loses only the clips in progress.

The files are in ``STORE/unfinished``, named by a hash of the id and written atomically. They are removed when their shard is written.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import socket
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from localmotion.video.shards import Clip, write_error

_ARRAYS = ("frames", "flow", "tracks", "visible", "track_id")
_EXTRA = "extra."
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, EOFError, MemoryError, zipfile.BadZipFile)
Result = Clip | dict[str, Any]


class Spool:
    """Results by id: clips, or dicts, for example with the reason of a rejection.

    A ``stamp`` (JSON-able) identifies the input of a result. A result with another stamp is ignored.
    """

    def __init__(self, store: Path) -> None:
        self.path = store / "unfinished"

    def put(self, name: str, result: Result, stamp: Any = None) -> None:
        """Store a result. Raises StoreError if the disk is full or not writable."""
        final = self._file(name)
        partial = final.with_suffix(f".partial-{socket.gethostname()}-{os.getpid()}")
        arrays: dict[str, Any] = {}
        if isinstance(result, Clip):
            arrays = {key: getattr(result, key) for key in _ARRAYS}
            arrays |= {f"{_EXTRA}{key}": value for key, value in result.extra.items()}
            rest = {f.name: getattr(result, f.name) for f in dataclasses.fields(Clip) if f.name not in (*_ARRAYS, "extra")}
            text = json.dumps({"id": name, "stamp": stamp, "clip": rest})
        else:
            text = json.dumps({"id": name, "stamp": stamp, "rejected": result})
        try:
            self.path.mkdir(exist_ok=True)
            with partial.open("wb") as file:
                np.savez(file, allow_pickle=False, text=np.array(text), **arrays)
            os.replace(partial, final)
        except OSError as error:
            raise write_error(self.path.parent, f"video {name}", error) from error
        finally:
            partial.unlink(missing_ok=True)

    def has(self, name: str, stamp: Any = None) -> bool:
        """Whether a result with this stamp (None: any) exists; its arrays are not read."""
        try:
            with np.load(self._file(name), allow_pickle=False) as found:
                text = json.loads(str(found["text"]))
                return bool(text["id"] == name and stamp in (None, text.get("stamp")))
        except _UNREADABLE:
            return False

    def get(self, name: str, stamp: Any = None) -> Result | None:
        """The result of an id; None if there is none with this stamp (None: any) or it cannot be read (it is then made again)."""
        try:
            with np.load(self._file(name), allow_pickle=False) as found:
                text = json.loads(str(found["text"]))
                if text["id"] != name or stamp not in (None, text.get("stamp")):
                    return None
                if "rejected" in text:
                    return dict(text["rejected"])
                extra = {key.removeprefix(_EXTRA): found[key] for key in found.files if key.startswith(_EXTRA)}
                return Clip(**text["clip"], **{key: found[key] for key in _ARRAYS}, extra=extra)
        except _UNREADABLE:
            return None

    def drop(self, names: Iterable[str]) -> None:
        """Remove these results, and the folder with the last one."""
        for name in names:
            self._file(name).unlink(missing_ok=True)
        if self.path.is_dir() and not any(self.path.iterdir()):
            self.path.rmdir()

    def clear(self) -> None:
        """Remove all results, also those of dead processes. Files shared by running processes are kept."""
        for pattern in ("*.npz", "*.partial-*"):
            for file in self.path.glob(pattern):
                file.unlink(missing_ok=True)
        self.drop([])

    def _file(self, name: str) -> Path:
        return self.path / f"{hashlib.sha256(os.fsencode(name)).hexdigest()[:32]}.npz"
