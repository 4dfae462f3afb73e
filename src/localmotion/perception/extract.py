"""Batch extraction: clips of a folder of videos into a clip store (paper, section 4.2.1, Algorithm 1 lines 5-8)."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from localmotion.errors import ConfigError, LocalmotionError, VideoError
from localmotion.perception.base import ClipMotion, works_on_gpu
from localmotion.perception.clips import ClipExtractor
from localmotion.perception.summary import ExtractSummary, flow_distribution
from localmotion.perception.unfinished import Refused, Shards, Task, VideoDone, make_plan
from localmotion.recipe import Recipe
from localmotion.video.bits import mask_layout
from localmotion.video.claims import shared_work
from localmotion.video.decode import iter_frames, memory_fault
from localmotion.video.history import Limits, clip_id, unambiguous
from localmotion.video.history import content as content_of
from localmotion.video.lerobot import keep_about
from localmotion.video.listing import VideoRef
from localmotion.video.manifest import check_limits
from localmotion.video.sources import open_videos
from localmotion.video.spool import Spool
from localmotion.video.store import Clip, ClipStoreWriter
from localmotion.video.timing import Decoding
from localmotion.video.workers import (
    MEMORY_LIMIT,
    TIME_LIMIT,
    Lost,
    Results,
    held_memory,
    limited_memory,
    stream_isolated,
)

__all__ = ["ExtractSummary", "clip_of", "extract_folder", "extract_many", "extract_one", "flow_distribution"]

TOGETHER = 16
"""Videos that a worker processes together if a network runs on a GPU."""
TOGETHER_FRAMES = 600
"""Maximum frames of a group. Their flow at 128 px is 80 MB, and more pairs do not use a GPU better."""


_EXTRACTORS: dict[str, ClipExtractor] = {}  # one per process and recipe, because building backends is slow


@dataclass(frozen=True)
class _Span:
    """Frames ``start`` to ``stop`` of a video, (T, percept_size, percept_size, 3)."""

    ref: VideoRef
    start: int
    frames: NDArray[np.uint8]
    info: dict[str, Any]
    """Their properties by `Decoding.take`."""
    rows: dict[str, NDArray[Any]] = field(default_factory=dict)
    """Further arrays of the whole video, by frame."""
    last: bool = False
    """Whether this is the last clip of the video."""
    left_out: int = 0
    more: bool = False

    @property
    def stop(self) -> int:
        return self.start + len(self.frames)


class _TooShortError(VideoError):
    def __init__(self, ref: VideoRef, frames: int, least: int) -> None:
        super().__init__(ref.path, "too_short", f"has {frames} frames, {least} are needed")
        self.frames = frames


Message = Clip | VideoDone | Refused


def extract_one(
    ref: VideoRef, recipe: Recipe, min_frames: int, max_frames: int, memory: int | None = None
) -> Clip | dict[str, str] | Refused:
    """The first clip of one video, or why it is rejected. ``memory``: bytes that decoding may use in addition to the kept frames."""
    for message in in_this_process(extract_many([Task(ref)], recipe, Limits(min_frames, max_frames, 1), memory)):
        if not isinstance(message, VideoDone):
            return message
        if message.rejected:
            return message.rejected
    raise AssertionError("neither a clip nor a reason")


def in_this_process(results: Results[list[Message]]) -> Iterator[Message]:
    """The messages of `extract_many`, one by one."""
    while True:
        try:
            yield from next(results)
        except StopIteration as end:
            yield from end.value
            return


def extract_many(tasks: Sequence[Task], recipe: Recipe, limits: Limits, memory: int | None = None) -> Results[list[Message]]:
    """Clips of each video, followed by its VideoDone. Networks process many videos together (`ClipExtractor.extract_many`).

    This is a generator, because a film may have any number of clips: `TOGETHER_FRAMES` frames and their clips are in memory. ``memory``:
    bytes that decoding one video may use in addition to the frames of two clips.
    """
    cv2.setNumThreads(1)
    key = recipe.hash()
    try:
        if key not in _EXTRACTORS:
            _EXTRACTORS[key] = ClipExtractor(recipe)
    except LocalmotionError as error:
        return [Refused(str(error))]
    waiting: list[_Span | VideoDone] = []

    def look() -> list[Message]:
        motions = iter(_motions(_EXTRACTORS[key], [span for span in waiting if isinstance(span, _Span)]))
        found: list[Message] = []
        for item in waiting:
            if isinstance(item, VideoDone):
                found.append(item)
            else:
                motion = next(motions)
                found.append(motion if isinstance(motion, Refused) else _clip_of_span(item, motion, recipe))
        waiting.clear()
        return found

    for task in tasks:
        ref = task.ref
        content = content_of(ref) if task.record else None
        done = VideoDone(ref.id, content=content)
        try:
            for number, span in enumerate(_spans(ref, recipe, limits, memory)):
                if sum(len(item.frames) for item in waiting if isinstance(item, _Span)) >= TOGETHER_FRAMES:
                    yield look()
                if number >= task.kept:
                    waiting.append(span)
                if len(tasks) == 1 and not span.last:
                    yield look()  # no message: the clip exists already; this only shows that the worker is alive
                done = VideoDone(ref.id, None, span.stop + span.left_out, span.left_out, span.more, content)
        except VideoError as error:
            waiting[:] = [item for item in waiting if isinstance(item, VideoDone) or item.ref.id != ref.id]
            rejected = {"id": ref.id, "reason": error.reason, "detail": error.detail}
            done = VideoDone(ref.id, rejected, error.frames if isinstance(error, _TooShortError) else 0, content=content)
        except LocalmotionError as error:
            return [*look(), Refused(str(error))]
        waiting.append(done)
    return look()


def _motions(extractor: ClipExtractor, spans: list[_Span]) -> Sequence[ClipMotion | Refused]:
    """Motion of all together; if that fails, of each alone, so clips that fit a GPU only alone succeed and an error names its video."""
    if not spans:
        return []
    try:
        return extractor.extract_many([(span.frames, clip_id(span.ref.id, span.start, span.stop)) for span in spans])
    except LocalmotionError as error:
        if len(spans) > 1:
            return [motion for span in spans for motion in _motions(extractor, [span])]
        return [Refused(f"{spans[0].ref.path}: {error}")]


def _spans(ref: VideoRef, recipe: Recipe, limits: Limits, memory: int | None) -> Iterator[_Span]:
    """The spans of one video by `Limits.spans`. The last one contains how many frames are left out, so each waits for the next."""
    found = Decoding()
    stream = iter_frames(
        ref, recipe.percept_size, recipe.frame_stride, fps=recipe.fps, legacy=recipe.legacy_decoding, found=found
    )
    allowance = 3 * 3 * limits.max_frames * recipe.percept_size**2
    rows = _rows(ref, recipe.frame_stride, memory)
    last: _Span | None = None
    start = grown = 0
    for _ in itertools.count() if limits.max_clips is None else range(limits.max_clips):
        held = held_memory() if memory else 0
        with limited_memory(memory and max(memory - grown, 0) + allowance):
            frames = _decoded(ref, stream, limits)
        grown += (
            held_memory() - held - frames.nbytes if memory else 0
        )  # memory that the decoder keeps also counts for the next span
        if len(frames) < limits.least:
            if last is None:
                raise _TooShortError(ref, len(frames), limits.min_frames)
            if limits.keep_rest and len(frames):
                whole = np.concatenate([last.frames, frames])
                yield replace(last, last=True, frames=whole, info=found.take() | last.info)
            else:
                yield replace(last, last=True, left_out=len(frames))
            return
        if last is not None:
            yield last
        last = _Span(ref, start, frames, found.take(), rows)
        start = last.stop
        if len(frames) < limits.max_frames:
            yield replace(last, last=True)
            return
    assert last is not None
    yield replace(last, last=True, more=_goes_on(stream))


def _rows(ref: VideoRef, stride: int, memory: int | None) -> dict[str, NDArray[Any]]:
    """The further arrays of a video, by kept frame."""
    try:
        with limited_memory(memory):
            return ref.rows.read(stride) if ref.rows else {}
    except MemoryError as error:
        raise memory_fault(ref.path) from error


def _decoded(ref: VideoRef, stream: Iterator[NDArray[np.uint8]], limits: Limits) -> NDArray[np.uint8]:
    """The next frames of a video, (T, percept_size, percept_size, 3), T at most ``max_frames``."""
    try:
        decoded = list(itertools.islice(stream, limits.max_frames))
        return np.stack(decoded) if decoded else np.zeros((0, 0, 0, 3), np.uint8)
    except MemoryError as error:
        raise memory_fault(ref.path) from error


def _clip_of_span(span: _Span, motion: ClipMotion, recipe: Recipe) -> Clip:
    source = {"video": span.ref.id, "start": span.start, "stop": span.stop}
    name = clip_id(span.ref.id, span.start, span.stop)
    clip = _clip(span.frames, motion, recipe, name, span.ref.label, span.info | {"cut_short": span.more or span.left_out > 0})
    rows = {key: array[span.start : span.stop] for key, array in span.rows.items()}
    return replace(clip, source=source, extra={**clip.extra, **rows})


def clip_of(frames: NDArray[np.uint8], clip_id: str, extractor: ClipExtractor, *, label: int | str | None = None) -> Clip:
    """The clip of (T, percept_size, percept_size, 3) uint8 frames in memory, e.g. just rendered.

    Same result as from a file that decodes to these frames and has the name ``clip_id``. Raises LocalmotionError for frames of another
    shape.
    """
    return _clip(frames, extractor.extract(frames, clip_id), extractor.recipe, clip_id, label, {"cut_short": False})


def clip_with(frames: NDArray[np.uint8], motion: ClipMotion, recipe: Recipe, clip_id: str) -> Clip:
    """The clip of (T, percept_size, percept_size, 3) uint8 frames whose motion is already known."""
    return _clip(frames, motion, recipe, clip_id, None, {"cut_short": False})


def _clip(
    frames: NDArray[np.uint8], motion: ClipMotion, recipe: Recipe, name: str, label: int | str | None, info: dict[str, Any]
) -> Clip:
    if recipe.ratio > 1:
        side = (recipe.size, recipe.size)
        frames = np.stack([cv2.resize(x, side, interpolation=cv2.INTER_AREA) for x in frames])
    extra = {} if motion.mask is None else {"mask": motion.mask}
    info = motion.info | info
    return Clip(name, frames, motion.flow, motion.tracks, motion.visible, motion.track_id, label=label, info=info, extra=extra)


def _goes_on(stream: Iterator[Any]) -> bool:
    """Whether a video has another frame, or damage in its place: frames that are left out may be damaged."""
    try:
        return next(stream, None) is not None
    except VideoError:
        return True


def extract_folder(
    videos: Path,
    out: Path,
    recipe: Recipe,
    *,
    list_file: Path | None = None,
    camera: str = "",
    min_frames: int = 25,
    max_frames: int = 300,
    max_clips: int | None = None,
    workers: int = 1,
    shard_clips: int = 32,
    progress: Callable[[int, int | None, str], Any] | None = None,
    timeout: float = TIME_LIMIT,
    memory: int | None = MEMORY_LIMIT,
    together: int | None = None,
) -> ExtractSummary:
    """Extract every video of ``videos`` into the store ``out``. Continues where an earlier call stopped.

    ``videos`` is a folder, or a LeRobot data set, `lerobot:PATH`, seen through ``camera``. The clips of a data set also have its actions,
    rewards and states (`video.lerobot.Logged.layout`), so stages that learn from logged episodes can use the store.

    A video is cut into consecutive clips of ``max_frames`` stored frames. A rest shorter than ``min_frames`` is left out and counted;
    of a data set it becomes a part of the clip before it, so that no reward and no end of an episode is lost.
    ``max_clips`` limits the clips per video (None: all); frames after them are not read. A video that is damaged anywhere before is
    rejected as a whole, and the store records the reason.

    The store remembers size and time of each video and the limits. A later call extracts again the videos that have changed, those that
    other limits would cut differently, and those that were rejected for time or memory; the new clips replace the old ones. Clips of
    removed videos stay, and the summary names the videos. Several processes, also on several machines, may extract one folder into one
    store: each claims one shard after another. A second process with other videos or limits is refused.

    Shards of ``shard_clips`` videos are a pure function of the sorted video list, so the same input and recipe give the same bytes for any
    number of workers and processes. Memory is bounded by the clips in progress, for any length of video. Videos are decoded in
    ``workers`` worker processes. If a decoder crashes, takes more than ``timeout`` seconds for a clip, or needs more than ``memory``
    bytes (None: no limit; perception itself is not counted), only its own video is rejected. ``workers=0`` runs in this process without
    those limits; use it for videos that you trust. Any interruption loses at most the clips in progress.

    ``together``: videos that a worker processes at once, so that networks run on larger batches (None: 16 if a backend runs on a GPU,
    fewer if some workers would get no video, else 1). A network may round differently in another batch; with the embedded backends the
    bytes are the same.

    Raises VideoError for a missing or empty folder and if no video is usable, and as `read_data_set`; StoreError for a store of another
    recipe or clip length, a store in use by a process with other work, or a full disk; ConfigError for invalid limits; LocalmotionError
    if a backend cannot be built or used.
    """
    if together is not None and together < 1:
        raise ConfigError(f"together={together}: a worker takes at least one video")
    began = time.monotonic()
    check_limits(Limits(min_frames, max_frames, max_clips))
    listed, data = open_videos(videos, list_file, camera)
    limits = Limits(min_frames, max_frames, max_clips, keep_rest=data is not None)
    refs = {ref.id: ref for ref in unambiguous(listed)}
    extra = mask_layout(recipe.size) if recipe.mask else {}
    if data:
        if recipe.fps:
            raise ConfigError(
                f"fps={recipe.fps:g}: the data set has {data.info['fps']:g} frames a second; use frame_stride instead"
            )
        extra = {**extra, **data.logged.layout(recipe.frame_stride)}
    writer = ClipStoreWriter.open(out, recipe.size, recipe.to_json(), recipe.hash(), recipe.tracks, shard_clips, extra)
    if data:
        keep_about(data, out, recipe.frame_stride)
    terms = {
        "videos": str(Path(videos).resolve()),
        "list": str(list_file and Path(list_file).resolve()),
        **limits.to_json(),
        "camera": camera,
    }
    summary = ExtractSummary(out, notes=data.notes if data else [])
    with shared_work(out, terms, lambda: make_plan(writer, refs, limits)) as work:
        shards = Shards(writer, Spool(out), work, refs, limits)
        planned = sum(len(names) for _, names in work.plan["shards"])
        size = together or (max(1, min(TOGETHER, planned // max(workers, 1))) if works_on_gpu(recipe) else 1)
        done, total = len(refs) - planned, len(refs)
        if progress:
            progress(done, total, "")
        call = partial(extract_many, recipe=recipe, limits=limits, memory=memory if workers > 0 else None)
        with contextlib.closing(results_of(call, shards.tasks(), workers, timeout, size)) as results:
            for task, message in results:
                if isinstance(message, Refused):
                    raise LocalmotionError(message.message)
                if isinstance(message, Clip):
                    summary.new += 1
                    shards.keep(task, message)
                    continue
                if isinstance(message, Lost):
                    rejected = {"id": task.ref.id, "reason": message.reason, "detail": message.detail}
                    message = VideoDone(task.ref.id, rejected)
                shards.finish_video(task, message)
                done += 1
                if progress:
                    progress(min(done, total), total, "")
        summary.again = {name: why for name, why in work.plan["again"].items() if name in refs}
        summary.elsewhere = [index for index, _ in work.plan["shards"] if not writer.has(index)]
        work.finished = not summary.elsewhere
        summary.seconds = time.monotonic() - began
        summary.fill(writer, refs)
    if not summary.usable and not summary.elsewhere:
        raise VideoError(
            videos, "unusable", f"none of {len(refs)} videos is usable: {summary.why_rejected()}; see localmotion scan"
        )
    return summary


def results_of(
    call: Callable[[Sequence[Task]], Results[list[Message]]], tasks: Iterable[Task], workers: int, timeout: float, together: int
) -> Generator[tuple[Task, Message | Lost]]:
    """(task, message) of each video, in the order of arrival."""
    taken: list[list[Task]] = []

    def groups() -> Iterator[list[Task]]:
        source = iter(tasks)
        while group := list(itertools.islice(source, together)):
            taken.append(group)
            yield group

    def of(group: list[Task], message: Message) -> Task:
        name = (
            message.source["video"]
            if isinstance(message, Clip)
            else message.id
            if isinstance(message, VideoDone)
            else group[0].ref.id
        )
        return next(task for task in group if task.ref.id == name)

    if workers <= 0:
        for group in groups():
            for message in in_this_process(call(group)):
                yield of(group, message), message
        return
    alone: list[Task] = []
    for number, answer in stream_isolated(call, groups(), workers, timeout * together):
        group = taken[number]
        if not isinstance(answer, Lost):
            for message in answer:
                task = of(group, message)
                if isinstance(message, VideoDone):
                    group.remove(task)
                yield task, message
        elif together == 1:
            yield group[0], answer
        else:  # run each alone to find the video at fault
            alone += group
    for number, answer in stream_isolated(call, [[task] for task in alone], workers, timeout):
        if isinstance(answer, Lost):
            yield alone[number], answer
        else:
            yield from ((alone[number], message) for message in answer)
