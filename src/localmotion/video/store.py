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
from localmotion.files import one_line, refuse_links
from localmotion.video.listing import shown
from localmotion.video.manifest_store import missing_line, planned_shards
from localmotion.video.remote import SMALL, Remote, is_remote
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
from localmotion.video.store_index import Lazy, StoreIndex, read_index
from localmotion.video.writer import ClipStoreWriter

__all__ = ["Clip", "ClipStore", "ClipStoreWriter", "array_specs", "check_id", "write_error"]

_READ_SHARDS = 8  # maximum number of shards whose entries are in memory, for a store with an index
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

        `path` may be an address of object storage (`video.remote`); shards are then downloaded when they are first used.
        A store with an index (`localmotion store finish`) opens without reading its shards: sizes of files are checked when they
        are first used. A store of a manifest also opens with `missing` shards.

        Raises StoreError if it is missing, is not a clip store, is damaged (the message names the shard and the fix) or has
        a gap in its shards.
        """
        self._remote = Remote(str(path)) if is_remote(path) else None
        self.path = self._remote.cache() if self._remote else Path(path)
        if self._remote:
            self._remote.get(SMALL, self.path)
        indices = self._remote.shards() if self._remote else shard_indices(self.path)
        self._index = read_index(self.path, indices)
        header = read_header(
            self.path, links=self._index is None
        )  # with an index, those of a shard are looked for at its first use
        self.size: int = header["size"]
        self.tracks: int = header["tracks"]
        self.recipe: dict[str, Any] = header["recipe"]
        self.recipe_hash: str = header["recipe_hash"]
        self.extra = extra_of(header)
        """Further arrays per frame by name: element type and shape of one frame's entry."""
        self.specs = array_specs(self.size, self.tracks, self.extra)
        if self._remote and self._index is None:
            raise StoreError(f"{path}: has no index of all of its shards; run localmotion store finish first")
        planned = planned_shards(self.path)
        self.missing: list[int] = sorted(set(range(planned or 0)) - set(indices))
        """Shards of its manifest that do not exist yet; always empty for a store without a manifest."""
        gaps = sorted(set(range(indices[-1] if indices else 0)) - set(indices) - set(self.missing))
        if gaps and not partial:
            raise StoreError(f"{self.path}: shard {gaps[0]:05d} is missing; run the same extract again to complete the store")
        self._shard_indices = indices
        self.ids: Sequence[str]
        self.labels: Sequence[int | str | None]
        self.infos: Sequence[dict[str, Any]]
        self.sources: Sequence[dict[str, Any]]
        self.videos: Sequence[str]
        """Id of the video that each clip was cut from."""
        self.lengths: NDArray[np.int64]
        if self._index is None:
            self._read_shards()
        else:
            self._use(self._index)
        self._maps: OrderedDict[tuple[int, str], NDArray[Any]] = OrderedDict()
        self._entries: OrderedDict[int, dict[int, dict[str, Any]]] = OrderedDict()
        self._lock = threading.Lock()

    def _read_shards(self) -> None:
        """Read the clips from the shards."""
        found = [(index, read_shard(self.path, index, self.specs)) for index in self._shard_indices]
        self._newest = {video: index for index, shard in found for video in shard["replaces"]}
        clips = [(index, entry) for index, shard in found for entry in shard["clips"]]
        clips = [(index, entry) for index, entry in clips if not self._replaced(video_of(entry), index)]
        self.ids = [entry["id"] for _, entry in clips]
        self.labels = [entry["label"] for _, entry in clips]
        self.infos = [entry["info"] for _, entry in clips]
        self.sources = [entry["source"] for _, entry in clips]
        self.videos = [video_of(entry) for _, entry in clips]
        self.lengths = np.asarray([entry["frames"] for _, entry in clips], np.int64)
        self._offsets: Sequence[int] | NDArray[np.int64] = [entry["offset"] for _, entry in clips]
        self._shards: Sequence[int] = [index for index, _ in clips]
        if len(set(self.ids)) != len(self.ids):
            twice = next(i for n, i in enumerate(self.ids) if i in self.ids[:n])
            raise StoreError(f"{self.path}: clip {twice!r} is stored twice; extract into a new folder")

    def _use(self, index: StoreIndex) -> None:
        """Take the clips from the index. What it does not hold is read from a shard when it is asked for."""
        self._newest = index.newest
        self.ids, self.labels, self.videos = index.ids, index.labels, index.videos
        self.infos = Lazy(len(index.ids), lambda i: dict(self._entry(i)["info"]))
        self.sources = Lazy(len(index.ids), lambda i: dict(self._entry(i)["source"]))
        self.lengths, self._offsets = index.lengths, index.offsets
        self._shards = Lazy(len(index.ids), index.shard)

    def _entry(self, i: int) -> dict[str, Any]:
        """The entry of a clip in its shard's index."""
        shard = self._shards[i]
        with self._lock:
            if shard not in self._entries:
                self._ready(shard)
                clips = read_shard(self.path, shard, self.specs)["clips"]
                self._entries[shard] = {entry["offset"]: entry for entry in clips}
                if len(self._entries) > _READ_SHARDS:
                    self._entries.popitem(last=False)
            entry = self._entries[shard].get(int(self._offsets[i]))
        if entry is None or entry["id"] != self.ids[i]:
            raise StoreError(f"{self.path}: its index and shard {shard:05d} differ; run localmotion store finish again")
        return entry

    def _ready(self, shard: int) -> None:
        """Download a shard of a remote store. Refuse links out of a shard, unless opening has looked for them."""
        if self._remote:
            self._remote.get_shard(shard, self.path)
        elif self._index is not None:
            refuse_links(self.path, StoreError, only=self.path / "shards" / f"{shard:05d}")

    def missing_line(self) -> str:
        """What is missing, on one line; empty for a complete store."""
        if not self.missing:
            return ""
        found = missing_line(self.missing, len(self._shard_indices))
        return f"{self.path}: {found}; extract --manifest makes them"

    def __len__(self) -> int:
        """Number of clips."""
        return len(self.ids)

    @property
    def shards(self) -> int:
        """Number of shards that exist."""
        return len(self._shard_indices)

    @property
    def indexed(self) -> bool:
        """Whether it was opened by its index."""
        return self._index is not None

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return int(self.lengths.sum()) * sum(spec.frame_bytes for spec in self.specs.values())

    @property
    def rejected(self) -> list[dict[str, Any]]:
        """The videos that extraction rejected, each with "id" and "reason"."""
        if self._remote:
            self._remote.get([f"shards/{index:05d}/rejected.jsonl" for index in self._shard_indices], self.path)
        entries = [(index, entry) for index in self._shard_indices for entry in read_rejected(self.path, index)]
        return [entry for index, entry in entries if not self._replaced(entry["id"], index)]

    def contents(self) -> dict[str, Any]:
        """What the store holds, JSON-able: number of clips and frames, a hash of its recipe and of the ids and lengths of its clips, and
        the number of shards that its manifest has and the store has not yet.

        Two stores with equal contents give the same batches, as far as this can be told without reading their pictures.
        """
        digest = hashlib.blake2b(self.recipe_hash.encode(), digest_size=16, person=b"lm-store")
        for name in self.ids:
            digest.update(name.encode("utf-8", "surrogateescape") + b"\0")
        digest.update(np.ascontiguousarray(self.lengths, "<i8").tobytes())
        found = {"clips": len(self), "frames": int(self.lengths.sum()), "hash": digest.hexdigest()}
        return found | ({"missing": len(self.missing)} if self.missing else {})

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
            self._ready(index)
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
            self._ready(shard)
            spec = self.specs[name]
            file = self.path / "shards" / f"{shard:05d}" / spec.file
            dtype = np.dtype(bool) if name == "visible" else np.dtype(spec.dtype)
            try:
                flat = np.memmap(file, dtype, "r")
            except (OSError, ValueError) as error:
                raise StoreError(f"{self.path}: shard {shard:05d} is damaged ({spec.file}: {error}); {FIX}") from error
            rows = len(flat) * flat.itemsize / spec.frame_bytes
            if self._index is not None and rows != self._index.rows(shard):
                want = self._index.rows(shard) * spec.frame_bytes
                raise StoreError(f"{self.path}: shard {shard:05d} is damaged ({spec.file} has not {want} bytes); {FIX}")
            array = np.asarray(flat).reshape(-1, *spec.shape)
            self._maps[shard, name] = array
            if len(self._maps) > _OPEN_FILES:
                self._maps.popitem(last=False)
            return array
