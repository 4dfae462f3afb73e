"""Streaming extraction: the Atomic Actions of an environment, frame by frame (drp.md 2, streaming form)."""

from __future__ import annotations

from collections import deque
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from localmotion.errors import LocalmotionError
from localmotion.perception.base import Frame, Recipe, StepMotion, recipe_backends
from localmotion.perception.points import Slots, scene_cut


def shrink_flow(flow: NDArray[np.float32], ratio: int) -> NDArray[np.float16]:
    """Area-average a field (..., H, W, 2) by ``ratio`` and express it in the smaller picture's pixels."""
    if ratio > 1:
        *lead, height, width, _ = flow.shape
        flow = flow.reshape(*lead, height // ratio, ratio, width // ratio, ratio, 2).mean((-4, -2)) / ratio
    return flow.astype(np.float16)


def shrink_points(points: NDArray[np.float32], ratio: int) -> NDArray[np.float32]:
    """Pixel coordinates in the picture that is ``ratio`` times smaller; pixel centres are whole numbers in both."""
    small: NDArray[np.float32] = ((points + 0.5) / ratio - 0.5).astype(np.float32)
    return small


class Magnitudes:
    """Running histogram of flow magnitude in pixels of the stored size: a mismatch with pre-training is seen in it at once."""

    edges = np.concatenate([[0.0], np.geomspace(1e-3, 64.0, 200)])

    def __init__(self) -> None:
        self.counts = np.zeros(len(self.edges), np.int64)
        self.sum, self.number = 0.0, 0

    def add(self, flow: NDArray[np.floating[Any]]) -> None:
        """Count a field (..., 2); every fourth pixel is enough."""
        size = np.linalg.norm(flow.reshape(-1, 2)[::4].astype(np.float32), axis=-1)
        self.counts += np.bincount(np.searchsorted(self.edges, size, side="right") - 1, minlength=len(self.edges))
        self.sum += float(size.sum())
        self.number += len(size)

    def quantiles(self) -> dict[str, float]:
        """mean, p50, p90, p99 (upper edge of the histogram's bin)."""
        if not self.number:
            return {"mean": 0.0, "p50": 0.0, "p90": 0.0, "p99": 0.0}
        share = np.cumsum(self.counts) / self.number
        upper = np.append(self.edges[1:], self.edges[-1])
        found = {f"p{int(q * 100)}": float(upper[int(np.searchsorted(share, q))]) for q in (0.5, 0.9, 0.99)}
        return {"mean": self.sum / self.number, **found}


class StreamingExtractor:
    """Flow and tracks of one environment. Same algorithm as the batch form with ``redraw_rounds=0``.

    Args:
        recipe: what pre-training used (its look-ahead settings are ignored).
        seed: of the point draw.
    """

    def __init__(self, recipe: Recipe, seed: int) -> None:
        self.recipe = recipe
        self.flow_backend, segment, track = recipe_backends(recipe)
        self.slots = Slots(recipe, segment, track, np.random.default_rng(seed))
        self.frames: deque[tuple[Frame, NDArray[np.uint8]]] = deque(maxlen=recipe.flow_span)
        self.magnitudes = Magnitudes()

    def _check(self, frame: Frame) -> NDArray[np.uint8]:
        side = self.recipe.percept_size
        if frame.shape != (side, side, 3) or frame.dtype != np.uint8:
            raise LocalmotionError(f"perception wants uint8 frames ({side}, {side}, 3), got {frame.dtype} {frame.shape}")
        grey: NDArray[np.uint8] = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
        return grey

    def reset(self, frame: Frame) -> StepMotion:
        """First frame of an episode (percept_size square, uint8 RGB): no motion yet."""
        grey = self._check(frame)
        self.slots.reset(frame, grey)
        self.frames.clear()
        self.frames.append((frame, grey))
        side, count = self.recipe.size, self.recipe.tracks
        return StepMotion(
            np.zeros((side, side, 2), np.float16),
            shrink_points(self.slots.points, self.recipe.ratio),
            np.zeros(count, bool),
            self.slots.track_id.copy(),
        )

    def step(self, frame: Frame) -> StepMotion:
        """Next frame: the motion that led to it."""
        if not self.frames:
            raise LocalmotionError("perception: step before reset")
        grey = self._check(frame)
        previous, previous_grey = self.frames[-1]
        if scene_cut(previous_grey, grey):
            flow = np.zeros((*grey.shape, 2), np.float32)
            step = self.slots.cut(frame, grey)
            self.frames.clear()
        else:
            flow = self.flow_backend.flow(self.frames[0][0][None], frame[None])[0]
            step = self.slots.step(previous, frame, previous_grey, grey, flow)
        self.frames.append((frame, grey))
        small = shrink_flow(flow, self.recipe.ratio)
        self.magnitudes.add(small)
        return StepMotion(small, shrink_points(step.points, self.recipe.ratio), step.visible, step.track_id)

    def state_dict(self) -> dict[str, Any]:
        """Arrays and numbers that continue this stream exactly."""
        return {"slots": self.slots.state(), "frames": [frame.copy() for frame, _ in self.frames]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.slots.load_state(state["slots"])
        self.frames.clear()
        for frame in state["frames"]:
            self.frames.append((np.array(frame), self._check(frame)))
