"""Atomic Actions of clips (paper, section 4.2.1, Algorithm 1 lines 5-8): flow, choice of points, and tracks."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Generator, Sequence
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from localmotion.errors import LocalmotionError
from localmotion.perception.base import ClipMotion, ManySegment, ManyTrack, Points, mask_backend, recipe_backends
from localmotion.perception.points import CutDetector, Known, Slots, draw_points, texture_weight
from localmotion.perception.saliency import magnitude, residual_flow
from localmotion.perception.stream import Magnitudes, shrink_flow, shrink_points
from localmotion.recipe import Recipe
from localmotion.video.bits import pack

SEGMENT_OFFSETS = (1, 2, 4)  # frames ahead whose flow determines the foreground at a segment's start


def seed_of(key: str, seed: int) -> int:
    """Seed of a clip's draws: a pure function of its id and the recipe's seed."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:8], "little")


class _Ask(NamedTuple):
    """A request of one clip to a backend."""

    backend: Literal["flow", "segment", "track", "mask"]
    arguments: tuple[Any, ...]


class _Choice(NamedTuple):
    """Points of one segment, most mobile first, and their tracks."""

    tracks: NDArray[np.float32]  # (T, N, 2) over the segment
    seen: NDArray[np.bool_]  # (T, N)
    score: NDArray[np.float32]  # (N,) standard deviation of the paths, pixels of `size`
    weight: NDArray[np.float32]  # (H, W) foreground of the segment's first frame

    def known(self, slots: Slots, first_id: int, age: int) -> Known | None:
        """Known tracks in frame ``age`` of the segment, for slots that still hold their chosen points."""
        if age >= len(self.tracks):
            return None
        own = slots.track_id == first_id + np.arange(len(slots.track_id))
        return Known(own, self.tracks[age], self.seen[age])


class ClipExtractor:
    """Atomic Actions of clips.

    With ``recipe.redraw_rounds > 0`` the points of each segment are chosen with look-ahead, as in the paper: they are drawn on the
    foreground of the segment's first frame and tracked to its end; points with little motion variance, and points that are soon lost, are
    drawn again, a bounded number of times; the most mobile points remain. A segment begins every ``segment_frames`` frames and at every
    scene cut. Within segments, and everywhere with ``redraw_rounds=0``, slots behave exactly as in streaming.

    Networks are called as rarely as possible, and for all clips of a call together: each clip is a generator that yields its requests and
    waits for the results. Flow and foreground are one request per clip, tracks one per segment and round.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.flow, self.segment, self.track = recipe_backends(recipe)
        self.mask = mask_backend(recipe)

    def extract(self, frames: NDArray[np.uint8], key: str) -> ClipMotion:
        """Motion of one clip, see `extract_many`."""
        return self.extract_many([(frames, key)])[0]

    def extract_many(self, clips: Sequence[tuple[NDArray[np.uint8], str]]) -> list[ClipMotion]:
        """Motion of each clip: (T, percept_size, percept_size, 3) uint8 frames, T >= 2, and its key.

        The key identifies the clip. Key and recipe seed determine every draw: a `StreamingExtractor` with ``seed_of(key, recipe.seed)``
        draws the same. With the embedded backends the result of a clip does not depend on the other clips, bit for bit; a network may
        round differently in another batch. Raises LocalmotionError for frames of another shape or type.

        ``info`` of a result: cuts (frames that begin a new scene), segments (start, salient points and whether any foreground was
        found, for each segment with look-ahead), lost and idle (slots drawn again because the point was lost, or stood still while
        something else moved), camera (mean motion of the camera, pixels of `size` per frame), mask (mean area and number
        of empty masks, if the recipe has a mask backend), followed (share of points usable), flow
        (mean and quantiles of the flow's magnitude, pixels of `size`).
        """
        courses = [self._course(frames, key) for frames, key in clips]
        motions: dict[int, ClipMotion] = {}
        answers: dict[int, Any] = dict.fromkeys(range(len(clips)))
        while answers:
            asks: list[tuple[int, _Ask]] = []
            for number, answer in answers.items():
                try:
                    asks += [(number, ask) for ask in courses[number].send(answer)]
                except StopIteration as end:
                    motions[number] = end.value
            answers = {number: [] for number, _ in asks}
            for (number, _), answer in zip(asks, self._answers([ask for _, ask in asks]), strict=True):
                answers[number].append(answer)
        return [motions[number] for number in range(len(clips))]

    def _answers(self, asks: list[_Ask]) -> list[Any]:
        """Results of the backends. Each backend is called once for all its requests."""
        answers: list[Any] = [None] * len(asks)
        for kind, together in (
            ("flow", self._flow_together),
            ("segment", self._segment_together),
            ("track", self._track_together),
            ("mask", self._mask_together),
        ):
            which = [index for index, ask in enumerate(asks) if ask.backend == kind]
            if which:
                for index, answer in zip(which, together([asks[i].arguments for i in which]), strict=True):
                    answers[index] = answer
        return answers

    def _flow_together(self, pairs: list[tuple[Any, ...]]) -> list[NDArray[np.float32]]:
        if len(pairs) < 2:
            return [self.flow.flow(*both) for both in pairs]
        fields = self.flow.flow(*(np.concatenate(side) for side in zip(*pairs, strict=True)))
        return np.split(fields, np.cumsum([len(first) for first, _ in pairs])[:-1])

    def _segment_together(self, asked: list[tuple[Any, ...]]) -> list[NDArray[np.float32]]:
        if isinstance(self.segment, ManySegment):
            return self.segment.weights(asked)
        return [self.segment.weight(*arguments) for arguments in asked]

    def _track_together(self, asked: list[tuple[Any, ...]]) -> list[tuple[NDArray[np.float32], NDArray[np.bool_]]]:
        if isinstance(self.track, ManyTrack):
            return self.track.tracks(asked)
        return [self.track.track(*arguments) for arguments in asked]

    def _mask_together(self, asked: list[tuple[Any, ...]]) -> list[NDArray[np.bool_]]:
        assert self.mask is not None
        return [self.mask.masks(*arguments) for arguments in asked]

    def _course(self, frames: NDArray[np.uint8], key: str) -> Generator[list[_Ask], list[Any], ClipMotion]:
        """The extraction of one clip, as a generator of requests."""
        recipe, length = self.recipe, len(frames)
        if length < 2 or frames.shape[1:] != (recipe.percept_size, recipe.percept_size, 3) or frames.dtype != np.uint8:
            raise LocalmotionError(f"extraction needs at least 2 uint8 frames of side {recipe.percept_size}, got {frames.shape}")
        grey = [cv2.cvtColor(x, cv2.COLOR_RGB2GRAY) for x in frames]
        detector = CutDetector()
        cuts = np.array([detector.step(x) for x in grey])
        ends = self._segments(cuts)
        fields, ahead = yield from self._flows(frames, cuts, ends)  # fields[t]: motion that led to frame t
        weights: list[NDArray[np.float32]] = []
        if ends:
            weights = yield [
                _Ask("segment", (frames[[t, *(t + k for k in flows)]], list(flows.values()))) for t, flows in ahead.items()
            ]
        foreground = dict(zip(ends, weights, strict=True))
        slots = Slots(recipe, self.segment, self.track, np.random.default_rng(seed_of(key, recipe.seed)))
        count = recipe.tracks
        tracks = np.zeros((length, count, 2), np.float32)
        visible = np.zeros((length, count), bool)
        track_id = np.zeros((length, count), np.int32)
        offline = np.zeros(length, bool)  # frames whose tracks came from an offline tracker, which is better than steps
        seen = np.zeros((length, count), bool)  # visible in those frames
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
                choice = yield from self._choose(frames[t : ends[t]], grey[t], foreground[t], slots.rng)
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
        packed = None
        if self.mask is not None:
            (masks,) = yield [_Ask("mask", (frames, (yield from self._steps(frames, cuts, fields)), cuts, recipe.size))]
            packed = pack(masks)
            empty = int((~masks.any((1, 2))).sum())
            info["mask"] = {"area": round(float(masks.mean()), 4), "empty": empty}
        return ClipMotion(small, shrink_points(tracks, recipe.ratio), visible, track_id, info, packed)

    def _segments(self, cuts: NDArray[np.bool_]) -> dict[int, int]:
        """First frame and end of each segment with look-ahead. A segment has at least three frames, because fewer have no variance."""
        if not self.recipe.redraw_rounds:
            return {}
        starts = sorted({*range(0, len(cuts), self.recipe.segment_frames), *np.flatnonzero(cuts).tolist()})
        return {start: end for start, end in itertools.pairwise([*starts, len(cuts)]) if end - start > 2}

    def _camera(self, fields: list[NDArray[np.float32]]) -> float:
        """Mean magnitude of the camera's motion, pixels of `size` per frame, over at most eight fields."""
        some = np.unique(np.linspace(0, len(fields) - 1, 8).round().astype(int))
        mean = np.mean([magnitude(residual_flow(fields[index])[1]).mean() for index in some])
        return round(float(mean) / self.recipe.ratio / self.recipe.flow_span, 4)

    def _flows(
        self, frames: NDArray[np.uint8], cuts: NDArray[np.bool_], ends: dict[int, int]
    ) -> Generator[list[_Ask], list[Any], tuple[list[NDArray[np.float32]], dict[int, dict[int, NDArray[np.float32]]]]]:
        """Flow (H, W, 2) that led to each frame, and for the start of each segment the flow to k frames ahead, by k.

        Flow to frame t starts at frame max(t - span, last cut); it is zero at t = 0 and across cuts. Flow ahead is computed only for a
        segmenter that uses motion.
        """
        length, span = len(frames), self.recipe.flow_span
        scene = np.maximum.accumulate(np.where(cuts, np.arange(length), 0))
        before = np.maximum(np.arange(length) - span, scene)
        offsets = SEGMENT_OFFSETS if self.segment.uses_motion else ()
        ahead = {start: [k for k in offsets if start + k < end] for start, end in ends.items()}
        pairs = [(int(before[t]), t) for t in range(length) if before[t] < t]
        pairs = list(dict.fromkeys([*pairs, *((t, t + k) for t, several in ahead.items() for k in several)]))
        found: dict[tuple[int, int], NDArray[np.float32]] = {}
        if pairs:
            first, second = (frames[list(side)] for side in zip(*pairs, strict=True))
            (answer,) = yield [_Ask("flow", (first, second))]
            found = dict(zip(pairs, answer, strict=True))
        still = np.zeros((*frames.shape[1:3], 2), np.float32)
        fields = [found[before[t], t] if before[t] < t else still for t in range(length)]
        return fields, {t: {k: found[t, t + k] / np.float32(k) for k in several} for t, several in ahead.items()}

    def _steps(
        self, frames: NDArray[np.uint8], cuts: NDArray[np.bool_], fields: list[NDArray[np.float32]]
    ) -> Generator[list[_Ask], list[Any], NDArray[np.float32]]:
        """Flow (T, H, W, 2) that led to each frame from the one before, zero at t = 0 and across cuts."""
        flows = np.stack(fields)
        if self.recipe.flow_span > 1:
            after = 1 + np.flatnonzero(~cuts[1:])
            if len(after):
                (flows[after],) = yield [_Ask("flow", (frames[after - 1], frames[after]))]
        return flows

    def _choose(
        self, frames: NDArray[np.uint8], grey: NDArray[np.uint8], weight: NDArray[np.float32], rng: np.random.Generator
    ) -> Generator[list[_Ask], list[Any], _Choice]:
        """The paper's choice of points for one segment; ``weight`` is the foreground of its first frame."""
        recipe, count = self.recipe, self.recipe.tracks
        chance = weight * texture_weight(grey) if weight.any() else texture_weight(grey)
        tracks, seen, score = yield from self._follow(frames, draw_points(chance, count, rng))
        for _ in range(recipe.redraw_rounds):
            weak = score < recipe.min_motion
            if not weak.any():
                break
            fresh = yield from self._follow(frames, draw_points(chance, int(weak.sum()), rng, tracks[0, ~weak]))
            better = fresh[2] > score[weak]
            index = np.flatnonzero(weak)[better]
            tracks[:, index], seen[:, index], score[index] = fresh[0][:, better], fresh[1][:, better], fresh[2][better]
        order = np.argsort(-score, kind="stable")
        return _Choice(tracks[:, order], seen[:, order], score[order], weight)

    def _follow(
        self, frames: NDArray[np.uint8], points: Points
    ) -> Generator[list[_Ask], list[Any], tuple[NDArray[np.float32], NDArray[np.bool_], NDArray[np.float32]]]:
        """Tracks (T, N, 2), visibility (T, N), and (N,) standard deviation of each path in pixels of `size`.

        The deviation is set to zero if the point is lost in the first half of the segment, because points should be mobile and stable.
        """
        ((tracks, visible),) = yield [_Ask("track", (frames, points))]
        seen = visible[..., None]
        number = np.maximum(seen.sum(0), 1)
        mean = (tracks * seen).sum(0) / number
        variance = (((tracks - mean) ** 2) * seen).sum(0) / number
        stable = visible.sum(0) >= len(frames) / 2
        score: NDArray[np.float32] = np.where(stable, np.sqrt(variance.sum(1)), 0.0).astype(np.float32)
        return tracks, visible, score / np.float32(self.recipe.ratio)
