"""Extraction into one store: the plan, the finished results, and the shards written from them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localmotion.errors import StoreError
from localmotion.video.claims import Work
from localmotion.video.history import SPAN, Limits, check_record, clip_id, outdated, size_and_time
from localmotion.video.listing import VideoRef, shown
from localmotion.video.shards import FIX
from localmotion.video.spool import Spool
from localmotion.video.store import Clip, ClipStoreWriter


@dataclass(frozen=True)
class Refused:
    """An error that concerns the recipe or the machine, not one video: it ends the extraction."""

    message: str


@dataclass(frozen=True)
class Task:
    """A video to extract. The clips of its first ``kept`` spans exist already; ``record`` requests a hash of its content."""

    ref: VideoRef
    kept: int = 0
    record: bool = False


@dataclass(frozen=True)
class VideoDone:
    """Sent after the clips of a video. If the video is rejected, its clips are dropped."""

    id: str
    rejected: dict[str, str] | None = None
    frames: int = 0
    """Number of kept frames that were read."""
    left_out: int = 0
    """Number of these in no clip."""
    more: bool = False
    """Whether the video has more frames."""
    content: str | None = None


def make_plan(writer: ClipStoreWriter, refs: dict[str, VideoRef], limits: Limits) -> dict[str, Any]:
    """The work to do: shards with the ids of their videos, and which of them are processed again, and why."""
    known = writer.known()
    again: dict[str, str] = {}
    for name in known.keys() & refs.keys():
        record = known[name].record
        if record is not None and not check_record(record):
            raise StoreError(f"{writer.path}: shard {known[name].shard:05d} is damaged (videos.jsonl: {shown(name)}); {FIX}")
        if record is not None and record["max_frames"] != limits.max_frames:
            raise StoreError(
                f"{writer.path}: was extracted with max_frames {record['max_frames']}, this command has {limits.max_frames}; "
                "use the same setting or another folder"
            )
        if why := outdated(known[name], refs[name], limits):
            again[name] = why
    return {"shards": writer.pending(refs, {name: known[name].shard for name in again}), "again": dict(sorted(again.items()))}


def stamp_of(ref: VideoRef, limits: Limits) -> dict[str, Any]:
    """What identifies the video that a result was made from."""
    rest = {"min_frames": limits.min_frames} if limits.keep_rest else {}  # the first clip has the same id with a rest and without
    return {**size_and_time(ref), "label": ref.label, "max_frames": limits.max_frames, **rest}


def video_record(ref: VideoRef, done: VideoDone, stamp: dict[str, Any], limits: Limits) -> dict[str, Any]:
    """The record of a finished video, for videos.jsonl. ``stamp``: its `stamp_of` before it was decoded."""
    record = {"id": ref.id, "frames": done.frames, "left_out": done.left_out, "more": done.more, "content": done.content}
    return {**record, **stamp, **limits.to_json(), **({"fault": True} if ref.fault is not None else {})}


class Shards:
    """Unfinished shards: their missing videos, their finished results, and writing them."""

    def __init__(self, writer: ClipStoreWriter, spool: Spool, work: Work, refs: dict[str, VideoRef], limits: Limits) -> None:
        self.writer, self.spool, self.work, self.refs, self.limits = writer, spool, work, refs, limits
        self.left: dict[int, set[str]] = {}
        self.members: dict[int, list[str]] = dict(work.plan["shards"])
        self.index = {name: index for index, names in self.members.items() for name in names}
        self.stamps: dict[str, dict[str, Any]] = {}

    def tasks(self) -> Iterator[Task]:
        """The tasks of one claimed shard after another; ends when other processes hold all remaining shards."""
        waiting, before = list(self.members), -1
        while waiting and len(waiting) != before:
            before, held = len(waiting), []
            for index in waiting:
                if index in self.left or self.writer.has(index):
                    continue
                if not self.work.claim(index):
                    held.append(index)
                elif self.writer.has(index):  # written by another process between the two checks
                    self.work.done(index)
                else:
                    yield from self._tasks_of(index)
            waiting = held

    def _tasks_of(self, index: int) -> Iterator[Task]:
        tasks = []
        for name in self.members[index]:
            ref = self.refs.get(name) or VideoRef(
                name, Path(name), "file", fault=("missing", "was removed after the plan was made")
            )
            stamp = self.stamps[name] = stamp_of(ref, self.limits)
            if not self.spool.has(_record_key(name), {**stamp, **self.limits.to_json()}):
                tasks.append(Task(ref, self._kept(name, stamp), record=True))
        self.left[index] = {task.ref.id for task in tasks}
        if not tasks:
            self._write(index)
        yield from tasks

    def _kept(self, name: str, stamp: dict[str, Any]) -> int:
        """Number of complete clips at the start of a video from an interrupted call, if the video has not changed."""
        return next(n for n in itertools.count() if not self.spool.has(self._whole(name, n), stamp))

    def _whole(self, name: str, number: int) -> str:
        """Id of a clip with all of its `max_frames` frames."""
        return clip_id(name, number * self.limits.max_frames, (number + 1) * self.limits.max_frames)

    def keep(self, task: Task, clip: Clip) -> None:
        """Store a finished clip."""
        self.spool.put(clip.id, clip, self.stamps[task.ref.id])

    def finish_video(self, task: Task, done: VideoDone) -> None:
        """Record that a video is done (its clips exist, or it is rejected). Writes the shard after its last video."""
        name = task.ref.id
        record = video_record(task.ref, done, self.stamps[name], self.limits)
        if done.rejected:  # damage after the first clips of a film
            self.spool.drop([self._whole(name, n) for n in range(self._kept(name, self.stamps[name]))])
        result = {"record": record, "rejected": done.rejected}
        self.spool.put(_record_key(name), result, {**self.stamps[name], **self.limits.to_json()})
        index = self.index[name]
        self.left[index].discard(name)
        if not self.left[index]:
            self._write(index)

    def _write(self, index: int) -> None:
        """Write a shard whose videos are all done."""
        if self.writer.has(index):  # without locks another process may have been faster, and have removed the results
            return
        results = [self._result(name) for name in self.members[index]]
        rejected = [result["rejected"] for result in results if result["rejected"]]
        stored = [result["record"] for result in results if not result["rejected"]]
        ids = sorted(clip_id(record["id"], *span) for record in stored for span in self.limits.spans(record["frames"]))
        again = [name for name in self.members[index] if name in self.work.plan["again"]]
        self.writer.write_shard(index, map(self._clip, ids), rejected, [result["record"] for result in results], again)
        self.spool.drop([*ids, *map(_record_key, self.members[index])])
        self.work.done(index)

    def _result(self, name: str) -> dict[str, Any]:
        result = self.spool.get(_record_key(name))
        if not isinstance(result, dict):
            raise StoreError(f"{self.spool.path}: the finished result of {shown(name)} is missing; run the same extract again")
        return result

    def _clip(self, name: str) -> Clip:
        clip = self.spool.get(name)
        if not isinstance(clip, Clip):
            video = part[1] if (part := SPAN.fullmatch(name)) and part[1] in self.index else name
            self.spool.drop([name, _record_key(video)])
            raise StoreError(
                f"{self.spool.path}: the finished clip {shown(name)} cannot be read; run the same extract again to make it again"
            )
        return clip


def _record_key(video: str) -> str:
    """Key under which the result of a whole video is kept beside its clips; it differs from every id."""
    return f"/{video}"
