"""Batch extraction: clips of a folder of videos into a clip store (paper 4.2.1, Algorithm 1 lines 5-8)."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from localmotion.errors import ConfigError, LocalmotionError, StoreError, VideoError
from localmotion.perception.base import ClipMotion, Points, Recipe, recipe_backends
from localmotion.perception.points import CutDetector, Known, Slots, draw_points, texture_weight
from localmotion.perception.saliency import magnitude, residual_flow
from localmotion.perception.stream import Magnitudes, shrink_flow, shrink_points
from localmotion.video.decode import iter_frames, memory_fault
from localmotion.video.listing import VideoRef, find_videos
from localmotion.video.spool import Spool
from localmotion.video.store import Clip, ClipStore, ClipStoreWriter
from localmotion.video.workers import MEMORY_LIMIT, TIME_LIMIT, Lost, limited_memory, map_isolated

SEGMENT_OFFSETS = (1, 2, 4)  # frames ahead whose flow decides the foreground at a segment's start


def seed_of(key: str, seed: int) -> int:
    """Seed of a clip's draws: a pure function of its id and the recipe's seed."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:8], "little")


class _Choice(NamedTuple):
    """Points of one segment, most mobile first, and where they go."""

    tracks: NDArray[np.float32]  # (T, N, 2) over the segment
    seen: NDArray[np.bool_]  # (T, N)
    score: NDArray[np.float32]  # (N,) standard deviation of the paths, pixels of `size`
    weight: NDArray[np.float32]  # (H, W) foreground of the segment's first frame

    def known(self, slots: Slots, first_id: int, age: int) -> Known | None:
        """What the choice knows of frame ``age`` of its segment: choosing has followed the points that slots still hold."""
        if age >= len(self.tracks):
            return None
        own = slots.track_id == first_id + np.arange(len(slots.track_id))
        return Known(own, self.tracks[age], self.seen[age])


class ClipExtractor:
    """Atomic Actions of one clip.

    With ``recipe.redraw_rounds > 0`` the points of each segment are chosen with look-ahead, as in the paper: drawn on the foreground of the
    segment's first frame, followed to its end, those of little motion variance or soon lost drawn again, a bounded number of times; the
    most mobile remain. A segment begins every ``segment_frames`` frames and at every scene cut. Within segments, and everywhere with
    ``redraw_rounds=0``, slots behave exactly as in the streaming form.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.flow, self.segment, self.track = recipe_backends(recipe)

    def extract(self, frames: NDArray[np.uint8], key: str) -> ClipMotion:
        """Motion of (T, percept_size, percept_size, 3) uint8 frames, T >= 2.

        ``key`` names the clip and with the recipe's seed decides every draw: a `StreamingExtractor` with
        ``seed_of(key, recipe.seed)`` draws the same. Raises LocalmotionError for frames of another shape or type.

        ``info`` of the result: cuts (frames that begin a new scene), segments (start, salient points and whether any foreground was
        found, of each segment chosen with look-ahead), lost and idle (slots drawn again because the point was lost, or stood still while
        something moved), camera (mean motion of the camera, pixels of `size` per frame), followed (share of points usable), flow
        (mean and quantiles of the flow's magnitude, pixels of `size`).
        """
        recipe, length = self.recipe, len(frames)
        if length < 2 or frames.shape[1:] != (recipe.percept_size, recipe.percept_size, 3) or frames.dtype != np.uint8:
            raise LocalmotionError(f"extraction wants at least 2 uint8 frames of side {recipe.percept_size}, got {frames.shape}")
        grey = [cv2.cvtColor(x, cv2.COLOR_RGB2GRAY) for x in frames]
        detector = CutDetector()
        cuts = np.array([detector.step(x) for x in grey])
        fields = self._fields(frames, cuts)  # fields[t]: motion that led to frame t
        slots = Slots(recipe, self.segment, self.track, np.random.default_rng(seed_of(key, recipe.seed)))
        count = recipe.tracks
        tracks = np.zeros((length, count, 2), np.float32)
        visible = np.zeros((length, count), bool)
        track_id = np.zeros((length, count), np.int32)
        offline = np.zeros(length, bool)  # frames whose tracks an offline tracker gave: better than steps, and already there
        seen = np.zeros((length, count), bool)  # in those frames
        ends = self._segments(cuts)
        segments: list[dict[str, Any]] = []
        choice: _Choice | None = None
        lost = idle = begun = first_id = 0
        for t in range(length):
            begins = t in ends
            if cuts[t]:
                if not offline[t - 1]:
                    tracks[t - 1], track_id[t - 1] = slots.points, slots.track_id
                visible[t - 1] = False
            elif offline[t] and not begins:
                slots.points, slots.visible = tracks[t].copy(), seen[t].copy()
            elif t and not (begins and offline[t - 1]):
                known = choice.known(slots, first_id, t - begun) if choice else None
                step = slots.step(frames[t - 1], frames[t], grey[t - 1], grey[t], fields[t], known)
                tracks[t - 1], visible[t - 1], track_id[t - 1] = step
                fresh = slots.track_id != step.track_id
                lost, idle = lost + int((fresh & ~step.visible).sum()), idle + int((fresh & step.visible).sum())
            if begins:
                choice = self._choose(frames[t : ends[t]], grey[t], fields[t + 1], slots.rng)
                slots.begin(choice.tracks[0], choice.weight)
                begun, first_id = t, int(slots.track_id[0])
                salient = int((choice.score >= recipe.min_motion).sum())
                segments.append({"start": t, "salient": salient, "foreground": bool(choice.weight.any())})
                if not self.track.causal:
                    part = slice(t, ends[t])
                    offline[part], track_id[part] = True, slots.track_id
                    tracks[part], seen[part] = choice.tracks, choice.seen
                    visible[part] = seen[part]
                    visible[t : ends[t] - 1] &= seen[t + 1 : ends[t]]
            elif t == 0 or cuts[t]:
                slots.reset(frames[t], grey[t])
        tracks[-1], track_id[-1], visible[-1] = slots.points, slots.track_id, False
        small = np.zeros((length, recipe.size, recipe.size, 2), np.float16)
        for t in range(1, length):
            small[t - 1] = shrink_flow(fields[t], recipe.ratio)
        magnitudes = Magnitudes()
        magnitudes.add(small[:-1])
        info = {
            "cuts": np.flatnonzero(cuts).tolist(),
            "segments": segments,
            "lost": lost,
            "idle": idle,
            "camera": self._camera(fields[1:]),
            "followed": round(float(visible[:-1].mean()), 4),
            "flow": {name: round(value, 5) for name, value in magnitudes.quantiles().items()},
        }
        return ClipMotion(small, shrink_points(tracks, recipe.ratio), visible, track_id, info)

    def _segments(self, cuts: NDArray[np.bool_]) -> dict[int, int]:
        """First frame and end of each segment whose points are chosen with look-ahead; three frames are the least that has variance."""
        if not self.recipe.redraw_rounds:
            return {}
        starts = sorted({*range(0, len(cuts), self.recipe.segment_frames), *np.flatnonzero(cuts).tolist()})
        return {start: end for start, end in itertools.pairwise([*starts, len(cuts)]) if end - start > 2}

    def _camera(self, fields: list[NDArray[np.float32]]) -> float:
        """Mean magnitude of the camera's motion, pixels of `size` per frame, over at most eight fields."""
        some = np.unique(np.linspace(0, len(fields) - 1, 8).round().astype(int))
        mean = np.mean([magnitude(residual_flow(fields[index])[1]).mean() for index in some])
        return round(float(mean) / self.recipe.ratio / self.recipe.flow_span, 4)

    def _fields(self, frames: NDArray[np.uint8], cuts: NDArray[np.bool_]) -> list[NDArray[np.float32]]:
        """fields[t]: (H, W, 2) flow from frame max(t - span, last cut) to t; zero at t = 0 and across cuts."""
        length, span = len(frames), self.recipe.flow_span
        scene = np.maximum.accumulate(np.where(cuts, np.arange(length), 0))
        first = np.maximum(np.arange(length) - span, scene)
        fields = [np.zeros((*frames.shape[1:3], 2), np.float32)] * length
        wanted = np.flatnonzero(first < np.arange(length))
        if len(wanted):
            for t, field in zip(wanted, self.flow.flow(frames[first[wanted]], frames[wanted]), strict=True):
                fields[t] = field
        return fields

    def _choose(
        self, frames: NDArray[np.uint8], grey: NDArray[np.uint8], field: NDArray[np.float32], rng: np.random.Generator
    ) -> _Choice:
        """The paper's choice of points for one segment; ``field`` is the flow that led to its second frame."""
        recipe, count = self.recipe, self.recipe.tracks
        flows: list[NDArray[np.float32]] = []
        ahead = [k for k in SEGMENT_OFFSETS if k < len(frames)] if self.segment.uses_motion else []
        if ahead:
            known = [field] if recipe.flow_span == 1 else []
            rest = ahead[len(known) :]
            flows = [*known, *self.flow.flow(np.repeat(frames[:1], len(rest), 0), frames[rest])]
            flows = [flow / np.float32(k) for k, flow in zip(ahead, flows, strict=True)]
        weight = self.segment.weight(frames[[0, *ahead]], flows)
        chance = weight * texture_weight(grey) if weight.any() else texture_weight(grey)
        tracks, seen, score = self._follow(frames, draw_points(chance, count, rng))
        for _ in range(recipe.redraw_rounds):
            weak = score < recipe.min_motion
            if not weak.any():
                break
            fresh = self._follow(frames, draw_points(chance, int(weak.sum()), rng, tracks[0, ~weak]))
            better = fresh[2] > score[weak]
            index = np.flatnonzero(weak)[better]
            tracks[:, index], seen[:, index], score[index] = fresh[0][:, better], fresh[1][:, better], fresh[2][better]
        order = np.argsort(-score, kind="stable")
        return _Choice(tracks[:, order], seen[:, order], score[order], weight)

    def _follow(
        self, frames: NDArray[np.uint8], points: Points
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_], NDArray[np.float32]]:
        """Tracks (T, N, 2), visibility (T, N), and (N,) standard deviation of each path in pixels of `size`.

        The deviation counts as zero where the point is lost in the first half of the segment: it should be mobile and stable.
        """
        tracks, visible = self.track.track(frames, points)
        seen = visible[..., None]
        number = np.maximum(seen.sum(0), 1)
        mean = (tracks * seen).sum(0) / number
        variance = (((tracks - mean) ** 2) * seen).sum(0) / number
        stable = visible.sum(0) >= len(frames) / 2
        score: NDArray[np.float32] = np.where(stable, np.sqrt(variance.sum(1)), 0.0).astype(np.float32)
        return tracks, visible, score / np.float32(self.recipe.ratio)


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

    def lines(self) -> list[str]:
        """For people."""
        rate = f", {self.new} new in {self.seconds:.0f} s ({self.new / self.seconds:.1f} clips/s)" if self.new else ""
        out = [f"{self.clips} clips, {self.frames:,} frames in {self.store}{rate}"]
        out += [f"  rejected {number}: {reason}" for reason, number in sorted(self.rejected.items())]
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
    cv2.setNumThreads(1)
    key = recipe.hash()
    try:
        if key not in _EXTRACTORS:
            _EXTRACTORS[key] = ClipExtractor(recipe)
        with limited_memory(memory and memory + 3 * 3 * max_frames * recipe.percept_size**2):
            frames, cut_short = _decoded(ref, recipe, min_frames, max_frames)
        motion = _EXTRACTORS[key].extract(frames, ref.id)
    except VideoError as error:
        return {"id": ref.id, "reason": error.reason, "detail": error.detail}
    except LocalmotionError as error:
        return _Refused(str(error))
    return _clip(frames, motion, recipe, ref.id, ref.label, {"cut_short": cut_short})


def _decoded(ref: VideoRef, recipe: Recipe, min_frames: int, max_frames: int) -> tuple[NDArray[np.uint8], bool]:
    """Frames (T, percept_size, percept_size, 3) of one video, and whether there would be more."""
    stream = iter_frames(ref, recipe.percept_size, recipe.frame_stride)
    try:
        decoded = list(itertools.islice(stream, max_frames))
        if len(decoded) < max(min_frames, 2):
            raise VideoError(ref.path, "too_short", f"has {len(decoded)} frames, {min_frames} are needed")
        cut_short = len(decoded) == max_frames and _goes_on(stream)
        return np.stack(decoded), cut_short
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
) -> ExtractSummary:
    """Extract every video below ``videos`` into the store ``out``, going on where an earlier call stopped.

    Shards are a pure function of the sorted video list, so the same input and recipe give the same bytes whatever the number of
    workers. Memory is bounded by the videos in work and one shard: of a video longer than ``max_frames`` stored frames the rest is left
    out, and its info says so. A rejected video leaves its reason in the store. Videos are decoded in ``workers`` processes of their
    own: a decoder that dies, takes more than ``timeout`` seconds, or wants more than ``memory`` bytes (None: no limit; what perception
    itself takes is not counted) costs its own video alone. ``workers=0`` does all in this process, without those limits: for videos
    whose source is known. An interruption of any kind loses at most the videos in work. Raises VideoError for a missing or empty
    folder, StoreError for a store of another recipe or a full disk, ConfigError for impossible limits, LocalmotionError when a backend
    cannot be built or used.
    """
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
    call = partial(extract_one, recipe=recipe, min_frames=min_frames, max_frames=max_frames, memory=limit)
    if progress:
        progress(done, total, "")
    for index, names in left.items():
        if not names:
            finish(index)
    with contextlib.closing(_results(call, [refs[name] for _, name in todo], workers, timeout)) as results:
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


def _results(call: Callable[[VideoRef], Any], refs: list[VideoRef], workers: int, timeout: float) -> Generator[tuple[int, Any]]:
    if workers <= 0:
        yield from enumerate(map(call, refs))
    else:
        yield from map_isolated(call, refs, workers, timeout)


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
