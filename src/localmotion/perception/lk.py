"""Embedded track backend: pyramidal Lucas-Kanade with a forward-backward check."""

from __future__ import annotations

from typing import ClassVar

import cv2
import numpy as np
from numpy.typing import NDArray

from localmotion.perception.base import Frame, Points, register


@register("track", "lk")
class LKTracks:
    """Sparse optical flow, window 15 (21 above 128 px), 3 pyramid levels.

    A point is lost if it leaves the picture, or if tracking it back ends more than ``0.01 side + 0.3`` pixels from its start.
    """

    name: ClassVar[str] = "lk"
    licence: ClassVar[str] = "Apache-2.0"
    causal: ClassVar[bool] = True

    def __init__(self, window: int | None = None, tolerance: float | None = None) -> None:
        self.window, self.tolerance = window, tolerance

    def step(self, previous: Frame, current: Frame, points: Points) -> tuple[Points, NDArray[np.bool_]]:
        """Advance (N, 2) points by one frame: new positions (lost points keep theirs) and which were found."""
        if len(points) == 0:
            return points.copy(), np.zeros(0, bool)
        height, width = previous.shape[:2]
        side = min(height, width)
        window = self.window or (15 if side <= 128 else 21)
        tolerance = self.tolerance if self.tolerance is not None else 0.01 * side + 0.3
        a, b = (cv2.cvtColor(x, cv2.COLOR_RGB2GRAY) if x.ndim == 3 else x for x in (previous, current))
        start = np.ascontiguousarray(points, np.float32).reshape(-1, 1, 2)
        moved, found, _ = cv2.calcOpticalFlowPyrLK(a, b, start, None, winSize=(window, window), maxLevel=2)
        back, found_back, _ = cv2.calcOpticalFlowPyrLK(b, a, moved, None, winSize=(window, window), maxLevel=2)
        moved, error = moved.reshape(-1, 2), np.linalg.norm((back - start).reshape(-1, 2), axis=1)
        both = np.stack([points, moved])
        inside = ((both >= -0.5) & (both <= (width - 0.5, height - 0.5))).all((0, 2))
        good = found.ravel().astype(bool) & found_back.ravel().astype(bool) & (error < tolerance) & inside
        return np.where(good[:, None], moved, points).astype(np.float32), good

    def track(self, frames: NDArray[np.uint8], points: Points, start: int = 0) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """`step` repeated; a lost point stays lost, at its last position."""
        grey = [cv2.cvtColor(x, cv2.COLOR_RGB2GRAY) for x in frames]
        tracks = np.repeat(points[None].astype(np.float32), len(frames), 0)
        visible = np.zeros(tracks.shape[:2], bool)
        visible[start] = True
        left = np.arange(len(points))  # lost points are not tracked further, because each takes at least as long as a found one
        for t in range(start + 1, len(frames)):
            if not len(left):
                tracks[t:] = tracks[t - 1]
                break
            tracks[t] = tracks[t - 1]
            tracks[t, left], good = self.step(grey[t - 1], grey[t], tracks[t - 1, left])
            left = left[good]
            visible[t, left] = True
        return tracks, visible
