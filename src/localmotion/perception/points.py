"""Track slots: where points are drawn, how they are tracked, when a slot gets a new point. One algorithm for clips and streams."""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from localmotion.errors import LocalmotionError
from localmotion.perception.base import Points, SegmentBackend, TrackBackend
from localmotion.recipe import Recipe

PATIENCE = 3  # frames that a point may stand still before it can be moved to something that moves
DECAY = 0.9  # of the running mean and variance of a point's position
MEMORY = 3  # the causal foreground weight is the median of this many newest flow fields
CUT = 45.0  # mean absolute grey difference (of 255) between frames that is always a scene cut
JUMP = 25.0  # ... that is a cut if it is also three times the previous difference: fast pans start gradually, cuts do not
CALM = 8.0  # difference assumed before the first frames of a scene
SPREAD = 0.4  # minimum distance between drawn points, as a share of the side of the area per point


def texture_weight(grey: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(H, W) in [0, 1]: how well a point can be tracked: the smaller eigenvalue of the local structure tensor."""
    strength = cv2.cornerMinEigenVal(grey, 5)
    rank = int(0.99 * (strength.size - 1))
    top = float(np.partition(strength, rank, axis=None)[rank])
    weight: NDArray[np.float32] = np.clip(strength / top, 0, 1) if top > 0 else np.ones_like(strength)
    return (0.02 + 0.98 * np.sqrt(weight)).astype(np.float32)


def draw_points(weight: NDArray[np.float32], count: int, rng: np.random.Generator, near: Points | None = None) -> Points:
    """Draw (count, 2) points, spread out, with probability proportional to ``weight`` (H, W), jittered within their pixel.

    Points keep a minimum distance from each other and from ``near`` (n, 2). It shrinks until all points have a place; no pixel is drawn
    twice. It starts at `SPREAD` times the side of one point's share of the weighted area, so points cover small and large objects alike.
    If fewer than ``count`` pixels have weight, the other points are drawn anywhere. Raises LocalmotionError for more points than pixels.
    """
    height, width = weight.shape
    if count > weight.size:
        raise LocalmotionError(f"cannot draw {count} points in a picture of {width}x{height} pixels; use fewer tracks")
    flat = weight.ravel().astype(np.float64)
    if np.count_nonzero(flat) < count:
        flat = flat + 1e-6
    # Exponential waiting times give a weighted draw without replacement in one pass: more points than needed, in the order of drawing.
    # log(weight) plus Gumbel noise of the same generator gives the same order, but takes five times longer to draw.
    candidates = np.flatnonzero(flat > 0)
    waits = -np.log(1.0 - rng.random(len(candidates))) / flat[candidates]
    number = min(8 * count, len(candidates))
    best = np.argpartition(waits, number - 1)[:number]
    best = candidates[best[np.argsort(waits[best], kind="stable")]]
    ys, xs = np.divmod(best, width)
    points = np.stack([xs, ys], 1).astype(np.float32)
    others = np.zeros((0, 2), np.float32) if near is None else near
    area = float(flat.sum() ** 2 / (flat**2).sum())  # effective number of pixels
    distance = SPREAD * float(np.sqrt(area / (count + len(others))))
    chosen = points[_spread(points, others, count, distance)]
    return chosen + rng.uniform(-0.5, 0.5, chosen.shape).astype(np.float32)


def _spread(points: Points, others: Points, count: int, distance: float) -> NDArray[np.intp]:
    """Indices of ``count`` of (m, 2) points in order of preference, ``distance`` apart; the distance is halved until this is possible."""
    if len(points) == count:
        return np.arange(count)
    own = _squared(points, points)  # (m, m)
    nearest = _squared(points, others).min(1) if len(others) else np.full(len(points), np.inf)
    taken = np.zeros(len(points), bool)
    while distance > 1:
        limit = distance**2
        near = own < limit
        free = ~taken & (nearest >= limit) & ~near[taken].any(0)
        while free.any() and taken.sum() < count:
            # Take all points without a better free point nearby. For each point, the best free point near it, including itself:
            order = np.flatnonzero(free)
            best = order[near[np.ix_(order, order)].argmax(1)]
            fresh = order[best == order][: count - int(taken.sum())]
            taken[fresh] = True
            free &= ~near[fresh].any(0)
        if taken.sum() >= count:
            break
        distance /= 2
    rest = np.flatnonzero(~taken)[: count - int(taken.sum())]
    taken[rest] = True
    return np.flatnonzero(taken)


def _squared(points: Points, others: Points) -> NDArray[np.float32]:
    """(m, n) squared distances between (m, 2) and (n, 2) points."""
    x, y = (points[:, axis, None] - others[None, :, axis] for axis in (0, 1))
    return x * x + y * y


class CutDetector:
    """Detects scene cuts in a sequence of grey frames, from the change of the whole picture. Causal.

    A cut changes the picture, averaged to 16 x 16, by `CUT`, or by `JUMP` and three times the previous change.
    """

    def __init__(self) -> None:
        self.thumb: NDArray[np.float32] | None = None
        self.change = CALM

    def step(self, grey: NDArray[np.uint8], *, first: bool = False) -> bool:
        """Whether this frame begins a new scene; always False for the ``first``."""
        thumb = np.asarray(cv2.resize(grey, (16, 16), interpolation=cv2.INTER_AREA), np.float32)
        before, self.thumb = self.thumb, thumb
        if first or before is None:
            self.change = CALM
            return False
        change = float(np.abs(thumb - before).mean())
        cut = change > CUT or (change > JUMP and change > 3 * self.change)
        self.change = CALM if cut else change
        return cut


class Step(NamedTuple):
    """One step of the slots, in percept pixels: previous points, whether each was found, identities."""

    points: Points  # (N, 2) in the previous frame
    visible: NDArray[np.bool_]  # (N,) visible there and found in the new frame
    track_id: NDArray[np.int32]  # (N,)


class Known(NamedTuple):
    """Slots whose points in the next frame are already known and need no tracking."""

    which: NDArray[np.bool_]  # (N,)
    points: Points  # (N, 2)
    found: NDArray[np.bool_]  # (N,)


class Slots:
    """N points that are tracked, lost, and drawn again on moving things. Causal: it never looks ahead.

    At the start nothing has moved yet, so points are drawn where texture makes them trackable. Once there is motion, lost points, and
    points that have stood still for a while (at most a quarter of the slots per frame), are drawn on the foreground. A slot with a new
    point gets a new track_id, because its history belongs to another track.
    """

    def __init__(self, recipe: Recipe, segment: SegmentBackend, track: TrackBackend, rng: np.random.Generator) -> None:
        self.recipe, self.segment, self.tracker, self.rng = recipe, segment, track, rng
        count = recipe.tracks
        self.points = np.zeros((count, 2), np.float32)
        self.visible = np.zeros(count, bool)
        self.track_id = np.full(count, -1, np.int32)
        self.age = np.zeros(count, np.int32)
        self.mean = np.zeros((count, 2), np.float32)
        self.variance = np.zeros(count, np.float32)
        self.next_id = 0
        self.flows: list[NDArray[np.float32]] = []  # newest first; never modified
        self.found: tuple[int, NDArray[np.float32]] | None = None  # age and weight, picture-based segmenters only

    def place(self, which: NDArray[np.bool_], points: Points) -> None:
        """Give the slots in ``which`` (N,) new points."""
        count = int(which.sum())
        self.points[which], self.visible[which] = points[:count], True
        self.track_id[which] = np.arange(self.next_id, self.next_id + count)
        self.next_id += count
        self.age[which], self.variance[which], self.mean[which] = 0, 0.0, points[:count]

    def begin(self, points: Points, weight: NDArray[np.float32]) -> None:
        """Start in a first frame with given (N, 2) points; ``weight`` (H, W) is the segmenter's result for the frame."""
        self.flows, self.found = [], None if self.segment.uses_motion else (0, weight)
        self.place(np.ones(len(self.points), bool), points)

    def reset(self, frame: NDArray[np.uint8], grey: NDArray[np.uint8]) -> None:
        """Draw all points in a first frame: on the segmenter's weight if it works without motion and finds something, else on texture."""
        found = self.segment.weight(frame[None], np.zeros((0, *grey.shape, 2), np.float32))
        weight = found if found.any() else texture_weight(grey)
        self.begin(draw_points(weight, len(self.points), self.rng), found)

    def step(
        self,
        previous: NDArray[np.uint8],
        frame: NDArray[np.uint8],
        previous_grey: NDArray[np.uint8],
        grey: NDArray[np.uint8],
        flow: NDArray[np.float32],
        known: Known | None = None,
    ) -> Step:
        """Track the points to the next frame, then draw lost and idle ones again."""
        before, seen, identity = self.points.copy(), self.visible.copy(), self.track_id.copy()
        pair = (previous_grey, grey) if self.tracker.causal else (previous, frame)
        if known is None:
            moved, found = self.tracker.step(*pair, self.points)
        else:
            moved, found, other = known.points.copy(), known.found.copy(), ~known.which
            moved[other], found[other] = self.tracker.step(*pair, self.points[other])
        good = seen & found
        self.points = np.where(good[:, None], moved, self.points)
        self.visible = good.copy()  # redrawing modifies it
        self.age += 1
        if self.found is not None:
            self.found = (self.found[0] + 1, self.found[1])
        self._remember()
        self.flows = [flow, *self.flows[: MEMORY - 1]]
        self._redraw(previous, frame, grey)
        return Step(before, good, identity)

    def cut(self, frame: NDArray[np.uint8], grey: NDArray[np.uint8]) -> Step:
        """A scene cut: all tracks end, new ones begin in the new scene."""
        before, identity = self.points.copy(), self.track_id.copy()
        self.reset(frame, grey)
        return Step(before, np.zeros(len(before), bool), identity)

    def _remember(self) -> None:
        """Running mean and variance of each point's position, in percept pixels."""
        delta = self.points - self.mean
        self.mean += (1 - DECAY) * delta
        self.variance = DECAY * (self.variance + (1 - DECAY) * (delta**2).sum(1))

    def _redraw(self, previous: NDArray[np.uint8], frame: NDArray[np.uint8], grey: NDArray[np.uint8]) -> None:
        lost = ~self.visible
        still = self.visible & (self.age >= PATIENCE) & (np.sqrt(self.variance) < self.recipe.min_motion * self.recipe.ratio)
        if not (lost.any() or still.any()):
            return
        weight = self._weight(previous, frame)
        moving = bool(weight.any())
        if still.any() and moving:
            xy = np.clip(np.round(self.points), 0, np.array(grey.shape[::-1]) - 1).astype(int)
            still &= weight[xy[:, 1], xy[:, 0]] < 0.2  # not where something moves now
            room = max(len(still) // 4 - int(lost.sum()), 0)
            order = np.flatnonzero(still)
            still[order[np.argsort(self.variance[order], kind="stable")[room:]]] = False
        else:
            still[:] = False
        which = lost | still
        if which.any():
            # Draw points where something moves and where they can be tracked.
            chance = weight * texture_weight(grey) if moving else texture_weight(grey)
            self.place(which, draw_points(chance, int(which.sum()), self.rng, self.points[~which]))

    def _weight(self, previous: NDArray[np.uint8], frame: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Foreground of this frame. A segmenter that uses the picture is slow and its result stays valid, so it runs once per segment."""
        if self.segment.uses_motion:
            return self.segment.weight(np.stack([frame, previous]), self.flows)
        if self.found is None or self.found[0] >= self.recipe.segment_frames:
            self.found = (0, self.segment.weight(frame[None], self.flows))
        return self.found[1]
