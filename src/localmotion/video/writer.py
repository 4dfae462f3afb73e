"""Write a clip store, shard by shard."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from localmotion.errors import StoreError
from localmotion.files import LOCK
from localmotion.video.shard_files import ShardFiles, publish
from localmotion.video.shards import (
    FORMAT,
    VERSION,
    Clip,
    Extra,
    alive,
    array_specs,
    arrays_json,
    check_id,
    dump,
    other_recipe,
    read_header,
    read_rejected,
    read_shard,
    read_videos,
    shard_indices,
    video_of,
    write_atomic,
    write_error,
)

_OWN = tuple(array_specs(1, 1))


@dataclass(frozen=True)
class Known:
    """The entry of one video in a store."""

    shard: int
    reason: str
    """Why it was rejected; empty for a video that was stored."""
    detail: str
    clips: int
    cut_short: bool
    """Whether frames after its last clip were left out."""
    label: int | str | None
    record: dict[str, Any] | None
    """Its record in `videos.jsonl`; None in stores of earlier versions."""


def _runs(names: Sequence[str], length: int) -> Iterator[list[str]]:
    for start in range(0, len(names), length):
        yield list(names[start : start + length])


class ClipStoreWriter:
    """Writes a clip store shard by shard. Create it with `open`; several processes may write to the same folder."""

    def __init__(self, path: Path, size: int, tracks: int, shard_clips: int, extra: Extra | None = None) -> None:
        self.path, self.size, self.tracks, self.shard_clips = path, size, tracks, shard_clips
        self.specs = array_specs(size, tracks, extra)

    @classmethod
    def open(
        cls,
        path: str | Path,
        size: int,
        recipe: dict[str, Any],
        recipe_hash: str,
        tracks: int,
        shard_clips: int = 64,
        extra: Extra | None = None,
        links: bool = True,
    ) -> ClipStoreWriter:
        """Create a store, or open one to continue; leftovers of interrupted shards are removed.

        `extra`: further arrays that every clip brings. `links`: refuse links everywhere in the store, not only at its top.
        Raises StoreError if the folder contains something else, or a
        store of another recipe, size, number of tracks or further arrays (the message names both), or is not writable.
        """
        path = Path(path)
        if size < 1 or tracks < 1 or shard_clips < 1:
            raise StoreError(f"{path}: size {size}, tracks {tracks} and shard_clips {shard_clips} must be at least 1")
        header = {
            "format": FORMAT,
            "version": VERSION,
            "size": size,
            "tracks": tracks,
            "shard_clips": shard_clips,
            "recipe": recipe,
            "recipe_hash": recipe_hash,
            "arrays": arrays_json(size, tracks, extra),
        }
        text = dump(header, indent=1)
        try:
            file = path / "store.json"
            if not file.exists():
                strangers = path.exists() and not all(e.name == LOCK or ".partial-" in e.name for e in path.iterdir())
                if strangers and not file.exists():  # another process may just have made it
                    raise StoreError(f"{path}: is not empty and not a clip store; use a new or empty folder")
                path.mkdir(parents=True, exist_ok=True)
                write_atomic(file, text)
            have, want = read_header(path, links), json.loads(text)
            for key in ("recipe_hash", "recipe", "size", "tracks", "shard_clips", "arrays"):
                if have[key] != want[key]:
                    raise StoreError(other_recipe(path, key, have, want))
            (path / "shards").mkdir(exist_ok=True)
            writer = cls(path, size, tracks, shard_clips, extra)
            writer._remove_leftovers()
        except OSError as error:
            raise write_error(path, "the store", error) from error
        return writer

    def done_ids(self) -> set[str]:
        """Ids of all videos in complete shards, stored and rejected."""
        return set(self.known())

    def known(self) -> dict[str, Known]:
        """The newest entry of each video, by id."""
        known: dict[str, Known] = {}
        for index in shard_indices(self.path):
            records = {record["id"]: record for record in read_videos(self.path, index)}
            for entry in read_shard(self.path, index, self.specs)["clips"]:
                video, last = video_of(entry), bool(entry["info"].get("cut_short"))
                before = known.get(video)
                clips = before.clips if before and before.shard == index and not before.reason else 0
                known[video] = Known(index, "", "", clips + 1, last, entry["label"], records.get(video))
            for entry in read_rejected(self.path, index):
                reason, detail = str(entry.get("reason") or "unknown"), str(entry.get("detail", ""))
                known[entry["id"]] = Known(index, reason, detail, 0, False, None, records.get(entry["id"]))
        return known

    def indices(self) -> list[int]:
        """Numbers of the existing shards."""
        return shard_indices(self.path)

    def has(self, index: int) -> bool:
        """Whether a shard exists."""
        return (self.path / "shards" / f"{index:05d}").exists()

    def pending(self, ids: Iterable[str], again: Mapping[str, int] | None = None) -> list[tuple[int, list[str]]]:
        """The remaining work: (shard index, ids) pairs, `shard_clips` ids each, in the order of the sorted ids.

        Ids that are not done are split into runs of `shard_clips`, which get the free indices in ascending order. For the
        same list of ids the assignment is the same, whichever shards are finished; ids added later go to new shards.
        `again` maps ids to process again to the shard that holds them now: they go to separate shards with higher
        numbers, which replace the old entries. A free number below another one gets a pair without ids, so the store has
        no gaps. Pass every pair to `write_shard`, with each id either among the clips or among the rejected.
        """
        again = dict(again or {})
        rest = sorted(set(ids) - self.done_ids() - set(again))
        taken = set(shard_indices(self.path))
        numbers = (index for index in itertools.count() if index not in taken)
        plan = {next(numbers): run for run in _runs(rest, self.shard_clips)}
        for run in _runs(sorted(again), self.shard_clips):
            newest = max(again[name] for name in run)
            index = next(numbers)
            while index < newest:
                plan[index] = []
                index = next(numbers)
            plan[index] = run
        top = max([*taken, *plan], default=-1)
        return sorted((plan | {index: [] for index in range(top) if index not in taken and index not in plan}).items())

    def write_shard(
        self,
        index: int,
        clips: Iterable[Clip],
        rejected: Sequence[dict[str, Any]] = (),
        videos: Sequence[dict[str, Any]] = (),
        replaces: Iterable[str] = (),
    ) -> None:
        """Write one shard atomically. An existing shard (from another, faster process) is kept.

        `clips` are stored sorted by id if they are a list or tuple. Other iterables are read one clip at a time, in
        their order, so only one clip is in memory. Each entry of `rejected` is a JSON-able dict with at least "id" and
        "reason", each entry of `videos` one with "id" (see `videos.jsonl`); both are stored sorted by id. `replaces` are
        videos whose entries in shards of lower numbers become obsolete. Raises StoreError for a clip of wrong shape or
        type or with a non-finite value, and if the disk is full; earlier shards do not change.
        """
        if isinstance(clips, list | tuple):
            clips = sorted(clips, key=lambda clip: clip.id)
        final = self.path / "shards" / f"{index:05d}"
        partial = final.with_name(f"{final.name}.partial-{socket.gethostname()}-{os.getpid()}")
        if final.exists():
            return
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            with ShardFiles(partial, self.specs) as files:
                for clip in clips:
                    self.check(clip)
                    files.add(clip)
                self.check_ids(index, files.clips, rejected)
                files.complete(rejected, videos, replaces)
            publish(partial, final)
        except OSError as error:
            raise write_error(self.path, f"shard {index:05d}", error) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def check_ids(self, index: int, clips: Sequence[dict[str, Any]], rejected: Sequence[dict[str, Any]]) -> None:
        """Raise StoreError for an id that is no plain name, or occurs twice in a shard."""
        refused = [str(entry["id"]) for entry in rejected]
        for name in refused:
            check_id(name)
        stored, videos = [entry["id"] for entry in clips], {video_of(entry) for entry in clips}
        if len(set(stored)) != len(stored) or len(set(refused)) != len(refused) or videos & set(refused):
            raise StoreError(f"{self.path}: shard {index:05d} got an id twice; ids must be unique")

    def check(self, clip: Clip) -> None:
        """Raise StoreError for a clip that does not fit the store."""
        check_id(clip.id)
        frames = len(clip.frames)
        if lacking := sorted(set(self.specs) ^ {*_OWN, *clip.extra}):
            raise StoreError(f"{self.path}: clip {clip.id}: arrays {lacking} are not in both, the clip and the store")
        for name, spec in self.specs.items():
            array, kind = clip.array(name), np.dtype(bool if name == "visible" else spec.dtype)
            if frames < 1 or array.shape != (frames, *spec.shape) or array.dtype != kind:
                want = f"({max(frames, 1)}, {', '.join(map(str, spec.shape))}) {kind}"
                raise StoreError(f"{self.path}: clip {clip.id}: {name} is {array.shape} {array.dtype}, not {want}")
            if kind.kind == "f" and not np.isfinite(array).all():
                raise StoreError(f"{self.path}: clip {clip.id}: {name} has non-finite values")
        if clip.flow[-1].any():
            raise StoreError(f"{self.path}: clip {clip.id}: the flow of the last frame is not zero")

    def _remove_leftovers(self) -> None:
        """Remove unfinished files of dead processes of this machine. Processes of other machines may be alive."""
        for leftover in [*self.path.glob("*.partial-*"), *(self.path / "shards").glob("*.partial-*")]:
            host, _, pid = leftover.name.partition(".partial-")[2].rpartition("-")
            if host == socket.gethostname() and pid.isdigit() and not alive(int(pid)):
                if leftover.is_dir():
                    shutil.rmtree(leftover, ignore_errors=True)
                else:
                    leftover.unlink(missing_ok=True)
