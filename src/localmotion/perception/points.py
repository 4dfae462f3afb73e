"""Track slots: where points are drawn, how they are followed, when a slot is given a new point. One algorithm for clips and for streams."""

from __future__ import annotations

from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from localmotion.perception.base import Points, Recipe, SegmentBackend, TrackBackend

PATIENCE = 3  # frames a point may stand still before it can be moved to where something moves
DECAY = 0.9  # of the running mean and variance of a point's position
MEMORY = 3  # most recent flow fields that the causal foreground weight is the median of
CUT = 45.0  # mean absolute grey difference (of 255) between frames that counts as a scene cut


def texture_weight(grey: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(H, W) in [0, 1]: how well a point can be followed, the smaller eigenvalue of the local structure."""
    strength = cv2.cornerMinEigenVal(grey, 5)
    top = float(np.quantile(strength, 0.99))
    weight: NDArray[np.float32] = np.clip(strength / top, 0, 1) if top > 0 else np.ones_like(strength)
    return (0.02 + 0.98 * np.sqrt(weight)).astype(np.float32)


def draw_points(weight: NDArray[np.float32], count: int, rng: np.random.Generator) -> Points:
    """Draw (count, 2) points without replacement with probability proportional to ``weight`` (H, W), jittered within their pixel."""
    flat = weight.ravel().astype(np.float64)
    if np.count_nonzero(flat) < count:
        flat = flat + 1e-6
    # Gumbel top-k is a weighted draw without replacement in one pass.
    keys = np.full(flat.shape, -np.inf)
    positive = flat > 0
    keys[positive] = np.log(flat[positive]) + rng.gumbel(size=int(positive.sum()))
    chosen = np.argpartition(-keys, count - 1)[:count]
    chosen = chosen[np.argsort(-keys[chosen], kind="stable")]
    ys, xs = np.divmod(chosen, weight.shape[1])
    points = np.stack([xs, ys], 1).astype(np.float32)
    return points + rng.uniform(-0.5, 0.5, points.shape).astype(np.float32)


def scene_cut(previous: NDArray[np.uint8], current: NDArray[np.uint8]) -> bool:
    """Whether two grey frames belong to different scenes."""
    a, b = (cv2.resize(x, (16, 16), interpolation=cv2.INTER_AREA).astype(np.float32) for x in (previous, current))
    return float(np.abs(a - b).mean()) > CUT


class Step(NamedTuple):
    """One advance of the slots, in percept pixels: points where they were, whether each was followed, identities."""

    points: Points  # (N, 2) in the previous frame
    visible: NDArray[np.bool_]  # (N,) seen there and found in the new frame
    track_id: NDArray[np.int32]  # (N,)


class Slots:
    """N points that are followed, lost, and drawn again on what moves. Causal: it never looks ahead.

    At the start nothing has moved yet, so points are drawn where texture makes them trackable; once there is motion, lost points,
    and points that have stood still for a while (at most a quarter of the slots per frame), are drawn on the foreground. A slot given
    a new point gets a new track_id: its history is another track's.
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
        self.flows: list[NDArray[np.float32]] = []
        self.found: tuple[int, NDArray[np.float32]] | None = None  # age and weight, picture-based segmenters only

    def place(self, which: NDArray[np.bool_], points: Points) -> None:
        """Give the slots in ``which`` (N,) new points."""
        count = int(which.sum())
        self.points[which], self.visible[which] = points[:count], True
        self.track_id[which] = np.arange(self.next_id, self.next_id + count)
        self.next_id += count
        self.age[which], self.variance[which], self.mean[which] = 0, 0.0, points[:count]

    def reset(self, frame: NDArray[np.uint8], grey: NDArray[np.uint8], weight: NDArray[np.float32] | None = None) -> None:
        """Draw all points in a first frame: on the segmenter's weight if it finds anything without motion, else on texture."""
        self.flows, self.found = [], None
        if weight is None:
            weight = self.segment.weight(frame[None], np.zeros((0, *grey.shape, 2), np.float32))
        if not weight.any():
            weight = texture_weight(grey)
        self.place(np.ones(len(self.points), bool), draw_points(weight, len(self.points), self.rng))

    def step(
        self,
        previous: NDArray[np.uint8],
        frame: NDArray[np.uint8],
        previous_grey: NDArray[np.uint8],
        grey: NDArray[np.uint8],
        flow: NDArray[np.float32],
    ) -> Step:
        """Follow the points to the next frame, then draw lost and idle ones again."""
        before, seen, identity = self.points.copy(), self.visible.copy(), self.track_id.copy()
        causal = self.tracker.causal
        moved, found = self.tracker.step(previous_grey if causal else previous, grey if causal else frame, self.points)
        good = seen & found
        self.points = np.where(good[:, None], moved, self.points)
        self.visible = good.copy()  # drawing again writes into it
        self.age += 1
        if self.found is not None:
            self.found = (self.found[0] + 1, self.found[1])
        self._remember()
        self.flows = [flow, *self.flows[: MEMORY - 1]]
        self._redraw(frame, grey)
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

    def _redraw(self, frame: NDArray[np.uint8], grey: NDArray[np.uint8]) -> None:
        lost = ~self.visible
        still = self.visible & (self.age >= PATIENCE) & (np.sqrt(self.variance) < self.recipe.min_motion * self.recipe.ratio)
        if not (lost.any() or still.any()):
            return
        weight = self._weight(frame)
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
            # Points are drawn where it moves and where they can be followed.
            chance = weight * texture_weight(grey) if moving else texture_weight(grey)
            self.place(which, draw_points(chance, int(which.sum()), self.rng))

    def _weight(self, frame: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Foreground of this frame. A segmenter that looks at the picture is costly and its answer lasts: asked once a segment."""
        if self.segment.uses_motion:
            return self.segment.weight(frame[None], np.stack(self.flows))
        if self.found is None or self.found[0] >= self.recipe.segment_frames:
            self.found = (0, self.segment.weight(frame[None], np.stack(self.flows)))
        return self.found[1]

    def state(self) -> dict[str, Any]:
        """Arrays and numbers that continue this stream exactly."""
        arrays = ("points", "visible", "track_id", "age", "mean", "variance")
        return {name: getattr(self, name).copy() for name in arrays} | {
            "next_id": self.next_id,
            "flows": [flow.copy() for flow in self.flows],
            "rng": self.rng.bit_generator.state,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` gave."""
        for name in ("points", "visible", "track_id", "age", "mean", "variance"):
            setattr(self, name, np.array(state[name]))
        self.next_id = int(state["next_id"])
        self.flows = [np.array(flow) for flow in state["flows"]]
        self.rng.bit_generator.state = state["rng"]
