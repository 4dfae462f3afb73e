"""The files of one shard while it is written, clip by clip, in a folder of its own; one rename publishes it."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np

from localmotion.video.shards import ArraySpec, Clip, dump, sync, sync_folder, write


class ShardFiles:
    """Writes the arrays of clips one after the other, and at the end the index of the shard. Raises OSError if the disk is full.

    A context: it closes its files.
    """

    def __init__(self, folder: Path, specs: Mapping[str, ArraySpec]) -> None:
        self.folder, self.specs = folder, specs
        self.clips: list[dict[str, Any]] = []
        """Entries of the clips, as shard.json has them."""
        self.frames = 0
        self._digests = {name: hashlib.sha256() for name in specs}
        self._files: dict[str, IO[bytes]] = {}
        self._bytes_a_frame = sum(spec.frame_bytes for spec in specs.values())
        self._mark = (0, 0, self._copies())

    def __enter__(self) -> ShardFiles:
        with ExitStack() as stack:
            for name, spec in self.specs.items():
                self._files[name] = stack.enter_context((self.folder / spec.file).open("wb"))
            self._open = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def add(self, clip: Clip) -> None:
        """Append a clip."""
        if shutil.disk_usage(self.folder).free < len(clip.frames) * self._bytes_a_frame:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        blocks = {name: np.ascontiguousarray(clip.array(name), spec.dtype).data for name, spec in self.specs.items()}
        entry = {"id": clip.id, "label": clip.label, "frames": len(clip.frames), "source": clip.source, "info": clip.info}
        self.append(entry, blocks)

    def append(self, entry: Mapping[str, Any], blocks: Mapping[str, Any]) -> None:
        """Append a clip as its entry and the bytes of its arrays."""
        for name, block in blocks.items():
            self._files[name].write(block)
            self._digests[name].update(block)
        self.clips.append({**entry, "offset": self.frames})
        self.frames += entry["frames"]

    def digests(self) -> dict[str, str]:
        """SHA-256 of the arrays so far, by name."""
        return {name: digest.hexdigest() for name, digest in self._digests.items()}

    def mark(self) -> None:
        """Write out what has been added, and let `back` return to this state."""
        for file in self._files.values():
            file.flush()
        self._mark = (len(self.clips), self.frames, self._copies())

    def back(self) -> None:
        """Remove what was added after `mark`."""
        count, frames, digests = self._mark
        if frames == self.frames:
            return
        self.frames = frames
        self._digests = {name: digest.copy() for name, digest in digests.items()}
        del self.clips[count:]
        for name, file in self._files.items():
            file.seek(self.frames * self.specs[name].frame_bytes)
            file.truncate()

    def complete(
        self, rejected: Sequence[dict[str, Any]], videos: Sequence[dict[str, Any]] = (), replaces: Iterable[str] = ()
    ) -> None:
        """Write all other files of the shard, and all of it to the disk. See `ClipStoreWriter.write_shard`."""
        shard: dict[str, Any] = {"clips": self.clips, "files": {}} | ({"replaces": sorted(replaces)} if replaces else {})
        for name, spec in self.specs.items():
            sync(self._files[name])
            shard["files"][spec.file] = {"bytes": self.frames * spec.frame_bytes, "sha256": self._digests[name].hexdigest()}
        for name, entries in {"rejected.jsonl": rejected, "videos.jsonl": videos}.items():
            if entries or name == "rejected.jsonl":
                ordered = sorted(entries, key=lambda entry: str(entry["id"]))
                write(self.folder / name, "".join(dump(entry) + "\n" for entry in ordered))
        write(self.folder / "shard.json", dump(shard, indent=1))
        sync_folder(self.folder)

    def _copies(self) -> dict[str, Any]:
        return {name: digest.copy() for name, digest in self._digests.items()}


def publish(folder: Path, final: Path) -> bool:
    """Rename a complete shard to its place. False if another process was faster, and its shard is there already.

    A rename onto a folder with files fails on every file system, so no lock is needed. Raises OSError.
    """
    try:
        os.rename(folder, final)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY) and not final.exists():
            raise
        return False
    sync_folder(final.parent)
    return True
