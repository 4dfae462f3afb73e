"""Extraction by shards: a part makes its shards of a manifest, and needs to know of no other part."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from localmotion.errors import ConfigError, LocalmotionError, StoreError
from localmotion.perception import extract
from localmotion.perception.base import works_on_gpu
from localmotion.perception.summary import ExtractSummary
from localmotion.perception.unfinished import Refused, Task, VideoDone, stamp_of, video_record
from localmotion.recipe import Recipe
from localmotion.video.bits import mask_layout
from localmotion.video.growing import GrowingShard, left_behind, remove_left_behind
from localmotion.video.lerobot import keep_about
from localmotion.video.manifest import Listed, Manifest
from localmotion.video.manifest_store import keep_manifest, shard_size
from localmotion.video.refs import VideoRef
from localmotion.video.remote import Remote, is_remote
from localmotion.video.spool import Spool
from localmotion.video.store import Clip, ClipStoreWriter
from localmotion.video.workers import MEMORY_LIMIT, TIME_LIMIT, Lost


@dataclass
class PartSummary(ExtractSummary):
    """Summary of one call of a part. All figures are of the shards that it made."""

    place: str = ""
    part: int = 0
    parts: int = 1
    shards: int = 0
    there: int = 0
    """Shards of the part that existed before."""
    lost: list[int] = field(default_factory=list)
    """Shards that another process finished first."""

    def lines(self) -> list[str]:
        rest = [line.replace(str(self.store), self.place) for line in super().lines()]
        there = f", {self.there} were there" if self.there else ""
        rest.insert(1, f"  part {self.part} of {self.parts}: {self.shards} shards made{there}")
        if self.lost:
            rest.append(f"  another process was faster with {len(self.lost)} shards; its shards count")
        return rest


def extract_shards(
    manifest: Path,
    out: Path | str,
    recipe: Recipe,
    part: int,
    parts: int,
    *,
    workers: int = 1,
    shard_clips: int | None = None,
    timeout: float = TIME_LIMIT,
    memory: int | None = MEMORY_LIMIT,
    together: int | None = None,
    progress: Callable[[int, int | None, str], Any] | None = None,
) -> PartSummary:
    """Make the shards of a ``manifest`` whose number modulo ``parts`` is ``part``, in the store ``out``. Skips those that exist.

    Parts may run at any time, on any machine that sees manifest, videos and store, also twice at once; they share nothing but the folder,
    and use no locks. A shard is made in a folder of its own and published by one rename, so the first to finish it counts. The bytes of a
    shard depend on the manifest, the videos and the recipe only. A part that was killed and is given again continues its unfinished
    shards behind their last finished video. When all parts are done, `video.finish.finish_store` completes the store.

    ``out`` may be an address of object storage, see `video.remote`. ``workers``: processes that decode (0: in this process, without limits
    of time and memory). Each takes a shard of its own as long as there are as many. ``shard_clips``: videos of a shard (None: those of an
    existing store, else `shard_size`). ``together``, ``timeout`` and ``memory`` as in `extract_folder`. A video whose size is not that of
    the manifest is rejected ("changed").

    Raises ConfigError for a manifest that cannot be read, a part that is not below ``parts``, or fps for a LeRobot data set; StoreError
    for a store of another manifest, recipe or ``shard_clips``, or a full disk; LocalmotionError if a backend cannot be built or used.
    """
    if not 0 <= part < parts:
        raise ConfigError(f"part {part} of {parts}: parts are numbered from 0 to {parts - 1}")
    if together is not None and together < 1:
        raise ConfigError(f"together={together}: a worker takes at least one video")
    began = time.monotonic()
    listed = Manifest(manifest)
    remote = Remote(str(out)) if is_remote(out) else None
    writer = _open(listed, remote.making() if remote else Path(out), recipe, shard_clips)
    count = -(-listed.videos // writer.shard_clips)
    mine = range(part, count, parts)
    if remote:
        _upload(remote, writer, mine)
    there = set(remote.shards() if remote else writer.indices())
    todo = [index for index in mine if index not in there]
    summary = PartSummary(writer.path, place=str(out), part=part, parts=parts, there=len(mine) - len(todo))
    size = together or (extract.TOGETHER if works_on_gpu(recipe) else 1)
    work = _Part(listed, writer, remote, summary, todo, progress)
    call = partial(extract.extract_many, recipe=recipe, limits=listed.limits, memory=memory if workers > 0 else None)
    lanes = max(1, min(workers, len(todo)))
    shares = [workers // lanes + (lane < workers % lanes) for lane in range(lanes)]
    if lanes == 1:
        work.run(call, workers, timeout, size)
    else:
        with ThreadPoolExecutor(lanes) as pool:
            running = [pool.submit(work.run, call, share, timeout, size) for share in shares]
            try:
                wait(running, return_when=FIRST_EXCEPTION)
            finally:
                work.stopped.set()  # the others stop at their next clip; without an error they are at their end
            for lane in running:
                lane.result()
    summary.seconds = time.monotonic() - began
    return summary


def _open(manifest: Manifest, out: Path, recipe: Recipe, shard_clips: int | None) -> ClipStoreWriter:
    """The store of a manifest, made if it does not exist."""
    extra = mask_layout(recipe.size) if recipe.mask else {}
    data = manifest.data_set
    if data:
        if recipe.fps:
            raise ConfigError(
                f"fps={recipe.fps:g}: the data set has {data.info['fps']:g} frames a second; use frame_stride instead"
            )
        extra = {**extra, **data.logged.layout(recipe.frame_stride)}
    size = shard_size(out, manifest, shard_clips)
    writer = ClipStoreWriter.open(out, recipe.size, recipe.to_json(), recipe.hash(), recipe.tracks, size, extra, links=False)
    keep_manifest(out, manifest, size)
    if data:
        keep_about(data, out, recipe.frame_stride)
    return writer


def _upload(remote: Remote, writer: ClipStoreWriter, mine: range) -> None:
    """Upload the top files of the store, and shards that an interrupted part has made and not uploaded."""
    remote.share(writer.path)
    for index in set(writer.indices()) & set(mine):
        remote.put_shard(index, writer.path)


class _Part:
    """The shards that a part has yet to make; its lanes take one after the other."""

    def __init__(
        self,
        manifest: Manifest,
        writer: ClipStoreWriter,
        remote: Remote | None,
        summary: PartSummary,
        todo: Sequence[int],
        progress: Callable[[int, int | None, str], Any] | None,
    ) -> None:
        self.manifest, self.writer, self.remote, self.summary, self.progress = manifest, writer, remote, summary, progress
        self.todo = iter(todo)
        self.leftovers = left_behind(writer.path)
        self.lock = threading.Lock()
        self.stopped = threading.Event()
        size = writer.shard_clips
        self.total = sum(min(size, manifest.videos - index * size) for index in todo)
        self.done = 0

    def run(self, call: Callable[..., Any], workers: int, timeout: float, together: int) -> None:
        """One lane: make shards until none is left."""
        with contextlib.ExitStack() as stack:
            lane = _Lane(self, stack)
            results = extract.results_of(call, lane.tasks(), workers, timeout, together)
            for task, message in stack.enter_context(contextlib.closing(results)):
                if self.stopped.is_set():
                    return
                if isinstance(message, Refused):
                    raise LocalmotionError(message.message)
                lane.take(task, message)

    def next_shard(self) -> int | None:
        with self.lock:
            return next(self.todo, None)

    def video_done(self, rejected: dict[str, str] | None) -> None:
        with self.lock:
            self.done += 1
            if rejected:
                self.summary.rejections.append(rejected)
                reason = rejected["reason"]
                self.summary.rejected[reason] = self.summary.rejected.get(reason, 0) + 1
            else:
                self.summary.usable += 1
            if self.progress:
                self.progress(self.done, self.total, "")


class _Open:
    """A shard in the making. Results of a video are appended in its turn; those that come too early wait on the disk."""

    def __init__(self, part: _Part, shard: GrowingShard, listed: Sequence[Listed]) -> None:
        self.part, self.shard = part, shard
        self.refs = {item.ref.id: _checked(item) for item in listed}
        self.stamps: dict[str, dict[str, Any]] = {}
        self.early: dict[str, list[str]] = {}
        self.finished: dict[str, VideoDone] = {}
        self.spool = Spool(shard.folder)

    @property
    def turn(self) -> str | None:
        """The video whose clips come next."""
        done = len(self.shard.results)
        return self.shard.names[done] if done < len(self.shard.names) else None

    def stamp(self, ref: VideoRef) -> dict[str, Any]:
        return self.stamps.setdefault(ref.id, stamp_of(ref, self.part.manifest.limits))

    def unchanged(self, record: dict[str, Any]) -> bool:
        stamp = self.stamp(self.refs[record["id"]])
        return all(record.get(key) == stamp[key] for key in stamp)

    def take(self, name: str, message: Clip | VideoDone) -> None:
        again = (
            isinstance(message, Clip) and message.source["start"] == 0
        )  # of a video that is made again after its group was lost
        if name != self.turn:
            if isinstance(message, VideoDone):
                self.finished[name] = message
            else:
                self.spool.put(message.id, message)
                self.early[name] = [*([] if again else self.early.get(name, [])), message.id]
            return
        if isinstance(message, Clip):
            if again:
                self.shard.drop_video()
            self.shard.add(message)
            return
        self._end(name, message)
        while (following := self.turn) is not None:
            waiting = self.early.pop(following, [])
            for clip in map(self.spool.get, waiting):
                if not isinstance(clip, Clip):
                    raise StoreError(f"{self.spool.path}: a finished clip cannot be read; run the same part again")
                self.shard.add(clip)
            self.spool.drop(waiting)
            if following not in self.finished:
                return
            self._end(following, self.finished.pop(following))

    def _end(self, name: str, done: VideoDone) -> None:
        ref = self.refs[name]
        self.shard.end_video(video_record(ref, done, self.stamp(ref), self.part.manifest.limits), done.rejected)
        self.part.video_done(done.rejected)


class _Lane:
    """A lane of a part: the shards that it has open, mostly one."""

    def __init__(self, part: _Part, stack: contextlib.ExitStack) -> None:
        self.part, self.stack = part, stack
        self.shards: dict[str, _Open] = {}

    def tasks(self) -> Iterator[Task]:
        part = self.part
        size = part.writer.shard_clips
        while (index := part.next_shard()) is not None:
            listed = part.manifest.listed(index * size, (index + 1) * size)
            shard = self.stack.enter_context(GrowingShard(part.writer, index, [item.ref.id for item in listed]))
            found = _Open(part, shard, listed)
            leftovers = part.leftovers.get(index, [])
            shard.take_over(leftovers, found.unchanged)
            remove_left_behind(leftovers)
            for result in shard.results:
                part.video_done(result["rejected"])
            part.summary.new -= shard.clips
            if found.turn is None:
                self._publish(found)
            for name in shard.names[len(shard.results) :]:
                self.shards[name] = found
                found.stamp(found.refs[name])
                yield Task(found.refs[name], record=True)

    def take(self, task: Task, message: Any) -> None:
        if isinstance(message, Lost):
            message = VideoDone(task.ref.id, {"id": task.ref.id, "reason": message.reason, "detail": message.detail})
        found = self.shards[task.ref.id]
        found.take(task.ref.id, message)
        if found.turn is None:
            self._publish(found)

    def _publish(self, found: _Open) -> None:
        shard, summary = found.shard, self.part.summary
        first = shard.publish()
        if first and self.part.remote:
            first = self.part.remote.put_shard(shard.index, self.part.writer.path)
        shard.__exit__()
        with self.part.lock:
            summary.shards += first
            summary.clips += shard.clips
            summary.new += shard.clips
            summary.frames += shard.frames
            if not first:
                summary.lost.append(shard.index)
        for name in shard.names:
            self.shards.pop(name, None)


def _checked(listed: Listed) -> VideoRef:
    """The video, with a fault if its file is not the one that was listed."""
    ref = listed.ref
    if ref.fault is None and listed.bytes is not None and ref.kind == "file":
        with contextlib.suppress(OSError):
            if (now := ref.path.stat().st_size) != listed.bytes:
                detail = f"has {now} bytes, the manifest says {listed.bytes}; scan again"
                return replace(ref, fault=("changed", detail))
    return ref
