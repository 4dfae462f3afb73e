"""Batch extraction: clips of a folder of videos into a clip store (paper 4.2.1, Algorithm 1 lines 5-8)."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from localmotion.errors import ConfigError, LocalmotionError, StoreError, VideoError
from localmotion.perception.base import ClipMotion, Recipe, works_on_gpu
from localmotion.perception.clips import ClipExtractor
from localmotion.perception.stream import Magnitudes
from localmotion.video.decode import iter_frames, memory_fault
from localmotion.video.listing import VideoRef, find_videos
from localmotion.video.spool import Spool
from localmotion.video.store import Clip, ClipStore, ClipStoreWriter
from localmotion.video.timing import Decoding
from localmotion.video.workers import MEMORY_LIMIT, TIME_LIMIT, Lost, limited_memory, map_isolated

TOGETHER = 16
"""Videos that a worker takes at once where a network on a GPU looks at them."""
TOGETHER_FRAMES = 600
"""Frames after which it looks before it takes more: their flow at 128 px is 80 MB, and more pairs fill no GPU any better."""

MIXED = 1.1
"""Ratio of the highest to the lowest frame rate above which rates are mixed."""


@dataclass
class ExtractSummary:
    """What an extraction did."""

    store: Path
    clips: int = 0
    frames: int = 0
    new: int = 0
    seconds: float = 0.0
    rejected: dict[str, int] = field(default_factory=dict)
    flow: dict[str, float] = field(default_factory=dict)
    rates: list[float] = field(default_factory=list)
    """Lowest and highest frames per second, where they are mixed and the recipe has no `fps`."""
    varying: int = 0
    """Clips of variable frame rate, where the recipe has no `fps`."""
    repeating: int = 0
    """Clips with repeated frames, because their videos have fewer than the recipe's `fps`."""

    def lines(self) -> list[str]:
        """For people."""
        rate = f", {self.new} new in {self.seconds:.0f} s ({self.new / self.seconds:.1f} clips/s)" if self.new else ""
        out = [f"{self.clips} clips, {self.frames:,} frames in {self.store}{rate}"]
        out += [f"  rejected {number}: {reason}" for reason, number in sorted(self.rejected.items())]
        mixed = [f"rates {round(self.rates[0], 1):g} to {round(self.rates[1], 1):g} fps are mixed"] if self.rates else []
        mixed += [f"clips of variable frame rate: {self.varying}"] if self.varying else []
        if mixed:
            out.append(f"  {', '.join(mixed)}; --fps N makes one time step one time")
        if self.repeating:
            out.append(f"  clips with repeated frames: {self.repeating}; their videos have fewer than --fps asks for")
        if not self.flow:
            return out
        values = ", ".join(f"{key} {value:.3f}" for key, value in self.flow.items())
        return [*out, f"flow magnitude in pixels of a stored frame: {values}"]


_EXTRACTORS: dict[str, ClipExtractor] = {}  # one per process and recipe: backends are costly to build


@dataclass(frozen=True)
class _Refused:
    """An error that concerns the recipe or the machine, not one video: it ends the extraction."""

    message: str


def extract_one(
    ref: VideoRef, recipe: Recipe, min_frames: int, max_frames: int, memory: int | None = None
) -> Clip | dict[str, str] | _Refused:
    """One video: a clip, or why it is rejected. ``memory``: bytes that decoding may take beside the frames that are kept."""
    return extract_many([ref], recipe, min_frames, max_frames, memory)[0]


def extract_many(
    refs: Sequence[VideoRef], recipe: Recipe, min_frames: int, max_frames: int, memory: int | None = None
) -> list[Clip | dict[str, str] | _Refused]:
    """As `extract_one` for each video; networks look at many of them at once (`ClipExtractor.extract_many`)."""
    cv2.setNumThreads(1)
    key = recipe.hash()
    results: dict[str, Clip | dict[str, str] | _Refused] = {}
    waiting: list[tuple[VideoRef, NDArray[np.uint8], dict[str, Any]]] = []

    def look() -> None:
        for (ref, frames, info), motion in zip(waiting, _motions(_EXTRACTORS[key], waiting), strict=True):
            if isinstance(motion, _Refused):
                results[ref.id] = motion
            else:
                results[ref.id] = _clip(frames, motion, recipe, ref.id, ref.label, info)
        waiting.clear()

    try:
        if key not in _EXTRACTORS:
            _EXTRACTORS[key] = ClipExtractor(recipe)
    except LocalmotionError as error:
        return [_Refused(str(error)) for _ in refs]
    for ref in refs:
        try:
            with limited_memory(memory and memory + 3 * 3 * max_frames * recipe.percept_size**2):
                waiting.append((ref, *_decoded(ref, recipe, min_frames, max_frames)))
        except VideoError as error:
            results[ref.id] = {"id": ref.id, "reason": error.reason, "detail": error.detail}
        except LocalmotionError as error:
            results[ref.id] = _Refused(str(error))
        if sum(len(frames) for _, frames, _ in waiting) >= TOGETHER_FRAMES:
            look()
    look()
    return [results[ref.id] for ref in refs]


def _motions(
    extractor: ClipExtractor, videos: list[tuple[VideoRef, NDArray[np.uint8], dict[str, Any]]]
) -> Sequence[ClipMotion | _Refused]:
    """Motion of all; where that fails, of each alone, so that what fits a GPU only by itself is done and the error names its video."""
    try:
        return extractor.extract_many([(frames, ref.id) for ref, frames, _ in videos])
    except LocalmotionError as error:
        if len(videos) > 1:
            return [motion for video in videos for motion in _motions(extractor, [video])]
        return [_Refused(f"{videos[0][0].path}: {error}")]


def _decoded(ref: VideoRef, recipe: Recipe, min_frames: int, max_frames: int) -> tuple[NDArray[np.uint8], dict[str, Any]]:
    """Frames (T, percept_size, percept_size, 3) of one video; whether there would be more (cut_short) and what `Decoding.take` has."""
    found = Decoding()
    stream = iter_frames(
        ref, recipe.percept_size, recipe.frame_stride, fps=recipe.fps, legacy=recipe.legacy_decoding, found=found
    )
    try:
        decoded = list(itertools.islice(stream, max_frames))
        if len(decoded) < max(min_frames, 2):
            raise VideoError(ref.path, "too_short", f"has {len(decoded)} frames, {min_frames} are needed")
        info = found.take()
        return np.stack(decoded), info | {"cut_short": len(decoded) == max_frames and _goes_on(stream)}
    except MemoryError as error:
        raise memory_fault(ref.path) from error


def clip_of(frames: NDArray[np.uint8], clip_id: str, extractor: ClipExtractor, *, label: int | str | None = None) -> Clip:
    """The clip of (T, percept_size, percept_size, 3) uint8 frames that are in memory already, e.g. just rendered.

    Same result as from a file that decodes to these frames and has the name ``clip_id``. Raises LocalmotionError for frames of another
    shape.
    """
    return _clip(frames, extractor.extract(frames, clip_id), extractor.recipe, clip_id, label, {"cut_short": False})


def _clip(
    frames: NDArray[np.uint8], motion: ClipMotion, recipe: Recipe, name: str, label: int | str | None, info: dict[str, Any]
) -> Clip:
    if recipe.ratio > 1:
        side = (recipe.size, recipe.size)
        frames = np.stack([cv2.resize(x, side, interpolation=cv2.INTER_AREA) for x in frames])
    return Clip(name, frames, motion.flow, motion.tracks, motion.visible, motion.track_id, label=label, info=motion.info | info)


def _goes_on(stream: Iterator[Any]) -> bool:
    """Whether a video has another frame, or damage where it would be: what is left out need not be whole."""
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
    min_frames: int = 25,
    max_frames: int = 300,
    workers: int = 1,
    shard_clips: int = 32,
    progress: Callable[[int, int | None, str], Any] | None = None,
    timeout: float = TIME_LIMIT,
    memory: int | None = MEMORY_LIMIT,
    together: int | None = None,
) -> ExtractSummary:
    """Extract every video below ``videos`` into the store ``out``, going on where an earlier call stopped.

    Shards are a pure function of the sorted video list, so the same input and recipe give the same bytes whatever the number of
    workers. Memory is bounded by the videos in work and one shard: of a video longer than ``max_frames`` stored frames the rest is left
    out, and its info says so. A rejected video leaves its reason in the store. Videos are decoded in ``workers`` processes of their
    own: a decoder that dies, takes more than ``timeout`` seconds, or wants more than ``memory`` bytes (None: no limit; what perception
    itself takes is not counted) costs its own video alone. ``workers=0`` does all in this process, without those limits: for videos
    whose source is known. An interruption of any kind loses at most the videos in work.

    ``together``: videos that a worker takes at once, so that networks look at many of them in one batch (None: 16 where a backend works
    on a GPU, fewer where that would leave workers without any, else 1). A network may round differently in another batch; with the
    embedded backends the bytes stay the same.

    Raises VideoError for a missing or empty folder, StoreError for a store of another recipe or a full disk, ConfigError for impossible
    limits, LocalmotionError when a backend cannot be built or used.
    """
    if together is not None and together < 1:
        raise ConfigError(f"together={together}: a worker takes at least one video")
    if not 2 <= max(min_frames, 2) <= max_frames:
        raise ConfigError(f"min_frames {min_frames} and max_frames {max_frames}: at least 2 frames, and no more than max_frames")
    refs = {ref.id: ref for ref in find_videos(videos, list_file)}
    writer = ClipStoreWriter.open(out, recipe.size, recipe.to_json(), recipe.hash(), recipe.tracks, shard_clips)
    spool = Spool(out)
    pending = writer.pending(refs)
    kept = {name for _, names in pending for name in names if spool.get(name) is not None}
    todo = [(index, name) for index, names in pending for name in names if name not in kept]
    left = {index: set(names) - kept for index, names in pending}
    members = dict(pending)

    def finish(index: int) -> None:
        """Write a shard all of whose videos are done."""
        results = [spool.get(name) for name in members[index]]
        if (
            any(x is None for x in results) and index not in writer.indices()
        ):  # unless another process was faster and has cleared up
            raise StoreError(f"{spool.path}: finished videos have gone; run the same extract again to make them anew")
        clips = [x for x in results if isinstance(x, Clip)]
        writer.write_shard(index, clips, [x for x in results if isinstance(x, dict)])
        spool.drop(members[index])

    began, done, total = time.monotonic(), len(refs) - len(todo), len(refs)
    new = 0
    limit = memory if workers > 0 else None
    call = partial(extract_many, recipe=recipe, min_frames=min_frames, max_frames=max_frames, memory=limit)
    if progress:
        progress(done, total, "")
    for index, names in left.items():
        if not names:
            finish(index)
    size = together or (max(1, min(TOGETHER, len(todo) // max(workers, 1))) if works_on_gpu(recipe) else 1)
    with contextlib.closing(_results(call, [refs[name] for _, name in todo], workers, timeout, size)) as results:
        for position, result in results:
            index, name = todo[position]
            if isinstance(result, _Refused):
                raise LocalmotionError(result.message)
            if isinstance(result, Lost):
                result = {"id": name, "reason": result.reason, "detail": result.detail}
            new += isinstance(result, Clip)
            spool.put(name, result)
            left[index].discard(name)
            if not left[index]:
                finish(index)
            done += 1
            if progress:
                progress(done, total, "")
    spool.clear()
    return _summary(out, new, time.monotonic() - began)


def _results(
    call: Callable[[Sequence[VideoRef]], list[Any]], refs: list[VideoRef], workers: int, timeout: float, together: int
) -> Generator[tuple[int, Any]]:
    """(position, result) of each video, in the order in which they come."""
    groups = [list(range(start, min(start + together, len(refs)))) for start in range(0, len(refs), together)]
    if workers <= 0:
        for group in groups:
            yield from zip(group, call([refs[i] for i in group]), strict=True)
        return
    alone: list[list[int]] = []
    for number, answer in map_isolated(call, [[refs[i] for i in group] for group in groups], workers, timeout * together):
        if not isinstance(answer, Lost):
            yield from zip(groups[number], answer, strict=True)
        elif together == 1:
            yield groups[number][0], answer
        else:  # whose fault it was shows when each has a worker to itself
            alone += [[i] for i in groups[number]]
    if alone:
        for number, answer in map_isolated(call, [[refs[i] for i in group] for group in alone], workers, timeout):
            yield alone[number][0], answer if isinstance(answer, Lost) else answer[0]


def _summary(out: Path, new: int, seconds: float) -> ExtractSummary:
    """Counts and the flow distribution of the whole store; the latter is also written beside store.json."""
    summary = ExtractSummary(out, new=new, seconds=seconds)
    try:
        store = ClipStore(out)
    except StoreError:
        if any((out / "shards").glob("*/shard.json")):
            raise
        return summary
    summary.clips, summary.frames = len(store), int(store.lengths.sum())
    for entry in store.rejected:
        summary.rejected[entry["reason"]] = summary.rejected.get(entry["reason"], 0) + 1
    rates = [info["fps"] for info in store.infos if "fps" in info]
    if rates and not store.recipe.get("fps"):
        if max(rates) > MIXED * min(rates):
            summary.rates = [min(rates), max(rates)]
        summary.varying = sum(bool(info.get("vfr")) for info in store.infos)
    summary.repeating = sum("repeated" in info for info in store.infos)
    if len(store):
        summary.flow = {key: round(value, 6) for key, value in flow_distribution(store).items()}
        temporary = out / "flow.json.tmp"
        temporary.write_text(json.dumps(summary.flow, indent=1, sort_keys=True) + "\n")
        os.replace(temporary, out / "flow.json")
    return summary


def flow_distribution(store: ClipStore, fields: int = 4096) -> dict[str, float]:
    """Mean and quantiles of flow magnitude (pixels of `size`) over at most ``fields`` fields spread evenly over the store."""
    lengths = store.lengths - 1  # the last field of a clip is no motion
    ends = np.cumsum(lengths)
    magnitudes = Magnitudes()
    for number in np.unique(np.linspace(0, int(ends[-1]) - 1, fields).round().astype(np.int64)):
        clip = int(np.searchsorted(ends, number, side="right"))
        at = int(number - (ends[clip] - lengths[clip]))
        magnitudes.add(store.window("flow", clip, at, at + 1))
    return magnitudes.quantiles()
