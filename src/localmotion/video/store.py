"""The clip store: decoded clips with their motion on disk, as raw memory-mapped shards. `shards` describes the files."""

from __future__ import annotations

import hashlib
import threading
from collections import Counter, OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localmotion.errors import StoreError
from localmotion.files import one_line
from localmotion.video.listing import shown
from localmotion.video.shards import (
    FIX,
    Clip,
    array_specs,
    check_id,
    extra_of,
    read_header,
    read_rejected,
    read_shard,
    shard_indices,
    video_of,
    write_error,
)
from localmotion.video.writer import ClipStoreWriter

__all__ = ["Clip", "ClipStore", "ClipStoreWriter", "array_specs", "check_id", "write_error"]

_OPEN_FILES = 512  # maximum number of open memory maps: each needs a file descriptor, and the usual limit is 1024


def reasons(rejected: Sequence[dict[str, Any]], first: int = 2) -> str:
    """Reason codes with their counts and the first few videos of each, most frequent first, on one line."""
    counts = Counter(str(entry.get("reason")) for entry in rejected)
    parts = []
    for reason, count in counts.most_common():
        names = [shown(str(entry["id"])) for entry in rejected if str(entry.get("reason")) == reason][:first]
        parts.append(f"{count} {one_line(reason, 60)}: {', '.join(names)}{', ...' if count > first else ''}")
    return "; ".join(parts)


class ClipStore:
    """Read a clip store through memory maps, opened on first use. Safe to use from several threads."""

    def __init__(self, path: str | Path, *, partial: bool = False) -> None:
        """Open a store and check its files' sizes. `partial` allows missing shards.

        Raises StoreError if it is missing, is not a clip store, is damaged (the message names the shard and the fix) or has
        a gap in its shards.
        """
        self.path = Path(path)
        header = read_header(self.path)
        self.size: int = header["size"]
        self.tracks: int = header["tracks"]
        self.recipe: dict[str, Any] = header["recipe"]
        self.recipe_hash: str = header["recipe_hash"]
        self.extra = extra_of(header)
        """Further arrays per frame by name: element type and shape of one frame's entry."""
        self.specs = array_specs(self.size, self.tracks, self.extra)
        self.ids: list[str] = []
        self.labels: list[int | str | None] = []
        self.infos: list[dict[str, Any]] = []
        self.sources: list[dict[str, Any]] = []
        self.videos: list[str] = []
        """Id of the video that each clip was cut from."""
        lengths, shards, offsets = [], [], []
        indices = shard_indices(self.path)
        if not partial and indices != list(range(len(indices))):
            gap = next(i for i in range(len(indices)) if i not in set(indices))
            raise StoreError(f"{self.path}: shard {gap:05d} is missing; run the same extract again to complete the store")
        found = [(index, read_shard(self.path, index, self.specs)) for index in indices]
        self._newest: dict[str, int] = {video: index for index, shard in found for video in shard["replaces"]}
        for index, shard in found:
            for entry in shard["clips"]:
                if self._replaced(video_of(entry), index):
                    continue
                self.ids.append(entry["id"])
                self.labels.append(entry["label"])
                self.infos.append(entry["info"])
                self.sources.append(entry["source"])
                self.videos.append(video_of(entry))
                lengths.append(entry["frames"])
                shards.append(index)
                offsets.append(entry["offset"])
        if len(set(self.ids)) != len(self.ids):
            twice = next(i for n, i in enumerate(self.ids) if i in self.ids[:n])
            raise StoreError(f"{self.path}: clip {twice!r} is stored twice; extract into a new folder")
        self.lengths: NDArray[np.int64] = np.asarray(lengths, np.int64)
        self._shards = shards
        self._offsets = offsets
        self._shard_indices = indices
        self._maps: OrderedDict[tuple[int, str], NDArray[Any]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Number of clips."""
        return len(self.ids)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return int(self.lengths.sum()) * sum(spec.frame_bytes for spec in self.specs.values())

    @property
    def rejected(self) -> list[dict[str, Any]]:
        """The videos that extraction rejected, each with "id" and "reason"."""
        entries = [(index, entry) for index in self._shard_indices for entry in read_rejected(self.path, index)]
        return [entry for index, entry in entries if not self._replaced(entry["id"], index)]

    def require_clips(self) -> None:
        """Raise StoreError with the reasons if the store has no clip."""
        if len(self):
            return
        if not (rejected := self.rejected):
            raise StoreError(f"{self.path}: holds no clips yet; run extract to the end first")
        raise StoreError(f"{self.path}: holds no clips; all {len(rejected)} videos were rejected ({reasons(rejected)})")

    def _replaced(self, video: str, shard: int) -> bool:
        """Whether a shard of a higher number holds a newer entry of this video."""
        return self._newest.get(video, shard) > shard

    def window(self, name: str, i: int, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Frames `start:stop` of array `name` ("frames", "flow", "tracks", "visible", "track_id", or one of `extra`) of
        clip `i`, a read-only view."""
        length = int(self.lengths[i])
        stop = length if stop is None else stop
        if not 0 <= start <= stop <= length:
            raise StoreError(f"{self.path}: clip {self.ids[i]} has {length} frames, requested {start}:{stop}")
        offset = self._offsets[i]
        return self._map(self._shards[i], name)[offset + start : offset + stop]

    def clip(self, i: int) -> Clip:
        """Clip `i`; its arrays are read-only views of the files (copy before changing or handing to
        torch.from_numpy)."""
        arrays = {name: self.window(name, i) for name in self.specs if name not in self.extra}
        extra = {name: self.window(name, i) for name in self.extra}
        return Clip(self.ids[i], **arrays, label=self.labels[i], source=self.sources[i], info=self.infos[i], extra=extra)

    def verify(self) -> None:
        """Read everything and compare with the stored SHA-256. Raises StoreError naming the first damaged shard."""
        for index in self._shard_indices:
            files = read_shard(self.path, index, self.specs)["files"]
            for name in (spec.file for spec in self.specs.values()):  # never a name from the file
                with (self.path / "shards" / f"{index:05d}" / name).open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                if digest != files[name].get("sha256"):
                    raise StoreError(f"{self.path}: shard {index:05d} is damaged ({name} has changed); {FIX}")

    def _map(self, shard: int, name: str) -> NDArray[Any]:
        with self._lock:
            have = self._maps.get((shard, name))
            if have is not None:
                self._maps.move_to_end((shard, name))
                return have
            spec = self.specs[name]
            file = self.path / "shards" / f"{shard:05d}" / spec.file
            dtype = np.dtype(bool) if name == "visible" else np.dtype(spec.dtype)
            try:
                flat = np.memmap(file, dtype, "r")
            except (OSError, ValueError) as error:
                raise StoreError(f"{self.path}: shard {shard:05d} is damaged ({spec.file}: {error}); {FIX}") from error
            array = np.asarray(flat).reshape(-1, *spec.shape)
            self._maps[shard, name] = array
            if len(self._maps) > _OPEN_FILES:
                self._maps.popitem(last=False)
            return array
