"""Finish a store: check that no shard is missing, and write its index and statistics."""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from localmotion.errors import StoreError
from localmotion.files import one_line
from localmotion.video.growing import left_behind, remove_left_behind
from localmotion.video.manifest_store import missing_line, planned_shards
from localmotion.video.remote import Remote, is_remote
from localmotion.video.shards import (
    ArraySpec,
    array_specs,
    extra_of,
    read_header,
    read_rejected,
    read_shard,
    read_videos,
    shard_indices,
    video_of,
    write_atomic,
    write_error,
)
from localmotion.video.store import ClipStore
from localmotion.video.store_index import FILE, IndexWriter, ShardColumns, shard_columns

STATISTICS = "statistics.json"


@dataclass
class Finished:
    """What a store holds."""

    store: Path | str
    shards: int = 0
    missing: list[int] = field(default_factory=list)
    videos: int = 0
    clips: int = 0
    frames: int = 0
    left_out: int = 0
    """Frames in no clip, because the rest of their video is shorter than `min_frames`."""
    rejected: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    def lines(self) -> list[str]:
        """Printable lines."""
        out = [f"{self.clips} clips, {self.frames:,} frames of {self.videos} videos in {self.shards} shards: {self.store}"]
        out += [f"  rejected {count}: {reason}" for reason, count in sorted(self.rejected.items())]
        if self.left_out:
            out.append(f"  left out {self.left_out:,} frames at the ends of videos, rests shorter than --min-frames")
        return out + ([f"  {missing_line(self.missing, self.shards)}"] if self.missing else [])


def finish_store(
    place: Path | str,
    *,
    partial_store: bool = False,
    workers: int = 1,
    progress: Callable[[int, int | None, str], Any] | None = None,
) -> Finished:
    """Write `index.bin` and `statistics.json` of a store, by reading all of its shards in ``workers`` processes (0 or 1: this one).

    Removes unfinished shards that nobody makes any more. Raises StoreError for a damaged shard; and if shards of its manifest are missing,
    unless ``partial_store``.
    """
    began = time.monotonic()
    remote = Remote(str(place)) if is_remote(place) else None
    store = remote.making() if remote else Path(place)
    header = read_header(store)
    indices = remote.shards() if remote else shard_indices(store)
    missing = sorted(set(range(planned_shards(store) or 0)) - set(indices))
    if missing and not partial_store:
        raise StoreError(
            f"{place}: {missing_line(missing, len(indices))}; run their parts again (shard i belongs to part i modulo PARTS), or give "
            "--partial"
        )
    found = Finished(place, len(indices), missing)
    index = IndexWriter()
    specs = array_specs(header["size"], header["tracks"], extra_of(header))
    read = partial(_read_remote, remote, specs) if remote else partial(_read, store, specs)
    for number, shard in _read_all(read, indices, workers, threads=remote is not None):
        index.add(number, shard.columns, shard.replaces)
        found.videos += shard.videos
        found.left_out += shard.left_out
        for reason, count in shard.rejected.items():
            found.rejected[reason] = found.rejected.get(reason, 0) + count
        if progress:
            progress(len(index), len(indices), "")
    found.clips, found.frames = index.finish()
    try:
        index.write(store)
        found.seconds = time.monotonic() - began
        values = {key: value for key, value in asdict(found).items() if key not in ("store", "seconds")}
        write_atomic(store / STATISTICS, json.dumps(values, indent=1, sort_keys=True) + "\n")
    except OSError as error:
        raise write_error(store, "the index", error) from error
    if remote:
        for name in (FILE, STATISTICS):
            remote.put(store / name, name)
    remove_left_behind(folder for number, folders in left_behind(store).items() if number in set(indices) for folder in folders)
    return found


def store_lines(path: Path | str) -> list[str]:
    """What a store holds, as printable lines. Reads the index if there is one. Raises StoreError."""
    store = ClipStore(path)
    gib = store.nbytes / 2**30
    lines = [f"{len(store)} clips, {int(store.lengths.sum()):,} frames, {gib:.2f} GiB in {store.shards} shards: {path}"]
    lines.append(f"  {store.size}x{store.size} pixels, {store.tracks} tracks, recipe {store.recipe_hash}")
    lines.append("  with an index" if store.indexed else "  without an index: localmotion store finish writes one")
    return lines + ([f"  {line}"] if (line := missing_line(store.missing, store.shards)) else [])


@dataclass(frozen=True)
class _Shard:
    columns: ShardColumns
    replaces: list[str]
    videos: int
    left_out: int
    rejected: Counter[str]


def _read_remote(remote: Remote, specs: dict[str, ArraySpec], index: int) -> _Shard:
    names = ("shard.json", "rejected.jsonl", "videos.jsonl")
    with tempfile.TemporaryDirectory() as folder:
        remote.get([f"shards/{index:05d}/{name}" for name in names], Path(folder))
        return _read(Path(folder), specs, index, remote.sizes(index))


def _read(store: Path, specs: dict[str, ArraySpec], index: int, sizes: dict[str, int] | None = None) -> _Shard:
    shard = read_shard(store, index, specs, sizes)
    rejected = read_rejected(store, index)
    records = read_videos(store, index)
    videos = len({video_of(entry) for entry in shard["clips"]})
    left_out = sum(int(record.get("left_out", 0)) for record in records)
    reasons = Counter(one_line(entry.get("reason"), 60) for entry in rejected)
    return _Shard(shard_columns(index, shard["clips"]), shard["replaces"], videos, left_out, reasons)


def _read_all(read: Callable[[int], _Shard], indices: Sequence[int], workers: int, threads: bool) -> Iterator[tuple[int, _Shard]]:
    """``threads``: many of them, for shards that have to be fetched."""
    if threads:
        with ThreadPoolExecutor(16) as pool:
            yield from zip(indices, pool.map(read, indices), strict=True)
        return
    if workers <= 1:
        yield from zip(indices, map(read, indices), strict=True)
        return
    with ProcessPoolExecutor(workers, get_context("spawn")) as processes:
        yield from zip(indices, processes.map(read, indices, chunksize=8), strict=True)
