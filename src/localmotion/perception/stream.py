"""Streaming extraction: the Atomic Actions of an environment, frame by frame (paper, section 4.2.1, without look-ahead)."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from numpy.typing import NDArray

from localmotion.errors import LocalmotionError
from localmotion.perception.base import ClipMotion, Frame, StepMotion, recipe_backends
from localmotion.perception.points import CutDetector, Slots
from localmotion.recipe import EXACT, Recipe

if TYPE_CHECKING:
    from localmotion.perception.exact import Exact


def shrink_flow(flow: NDArray[np.float32], ratio: int) -> NDArray[np.float16]:
    """Area-average a field (..., H, W, 2) by ``ratio`` and express it in the smaller picture's pixels."""
    flow = np.ascontiguousarray(flow, np.float32)
    if ratio > 1:
        # Sums of strided views, both components as one complex number: ten times faster than a mean over two axes.
        both = flow.view(np.complex64)[..., 0]
        total = np.zeros((*both.shape[:-2], both.shape[-2] // ratio, both.shape[-1] // ratio), np.complex64)
        for y in range(ratio):
            for x in range(ratio):
                total += both[..., y::ratio, x::ratio]
        flow = total[..., None].view(np.float32)
    # OpenCV rounds to float16 like numpy, but numpy is up to a hundred times slower for values below 6e-5, i.e. for still pictures.
    small = cv2.multiply(flow.reshape(-1, flow.shape[-2] * 2), 1 / ratio**3, dtype=cv2.CV_16F) if flow.size else flow
    return np.asarray(small, np.float16).reshape(flow.shape)


def shrink_points(points: NDArray[np.float32], ratio: int) -> NDArray[np.float32]:
    """Pixel coordinates in a picture that is ``ratio`` times smaller. Pixel centres are integers in both."""
    small: NDArray[np.float32] = ((points + 0.5) / ratio - 0.5).astype(np.float32)
    return small


CLIP_ARRAYS = ("flow", "tracks", "visible", "track_id")


class Magnitudes:
    """Running histogram of flow magnitude in pixels of the stored size."""

    edges = np.concatenate([[0.0], np.geomspace(1e-3, 64.0, 200)])
    every = 11

    def __init__(self) -> None:
        self.counts = np.zeros(len(self.edges), np.int64)
        self.sum, self.number = 0.0, 0

    def add(self, flow: NDArray[np.floating[Any]]) -> None:
        """Count fields (..., 2). Uses every eleventh pixel; no usual width is a multiple of 11, so all columns are sampled."""
        x, y = flow.reshape(-1, 2)[:: self.every].astype(np.float32).T
        size = np.sqrt(x * x + y * y)
        self.counts += np.bincount(np.searchsorted(self.edges, size, side="right") - 1, minlength=len(self.edges))
        self.sum += float(size.sum(dtype=np.float64))
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
        recipe: that of pre-training (its look-ahead settings are ignored).
        seed: of the point draw.
        env: the environment that shows the frames, for recipes with exact motion. `reset` and `step` then follow its own.

    Raises:
        ConfigError: the recipe asks for exact motion and there is no environment.
    """

    def __init__(self, recipe: Recipe, seed: int, env: Any = None) -> None:
        self.recipe = recipe
        self.exact: Exact | None = None
        if recipe.exact and env is not None:
            from localmotion.perception.exact import Exact  # imports the environments

            self.exact = Exact(env, recipe.percept_size, recipe.flow_span)
        self.flow_backend, segment, track = recipe_backends(recipe, self.exact)
        self.slots = Slots(recipe, segment, track, np.random.default_rng(seed))
        self.frames: deque[tuple[Frame, NDArray[np.uint8]]] = deque(maxlen=recipe.flow_span)
        self.cuts = CutDetector()
        self.magnitudes = Magnitudes()
        """Flow magnitudes of all steps since construction; resets do not clear it."""

    def _check(self, frame: Frame) -> NDArray[np.uint8]:
        side = self.recipe.percept_size
        if frame.shape != (side, side, 3) or frame.dtype != np.uint8:
            raise LocalmotionError(f"perception needs uint8 frames ({side}, {side}, 3), got {frame.dtype} {frame.shape}")
        grey: NDArray[np.uint8] = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
        return grey

    def reset(self, frame: Frame) -> StepMotion:
        """First frame of an episode (percept_size square, uint8 RGB): no motion yet. Raises LocalmotionError for another frame."""
        grey = self._check(frame)
        if self.exact:
            self.exact.begin()
        self.slots.reset(frame, grey)
        self.cuts.step(grey, first=True)
        self.frames.clear()
        self.frames.append((frame.copy(), grey))  # environments may reuse the same buffer
        side, count = self.recipe.size, self.recipe.tracks
        return StepMotion(
            np.zeros((side, side, 2), np.float16),
            shrink_points(self.slots.points, self.recipe.ratio),
            np.zeros(count, bool),
            self.slots.track_id.copy(),
        )

    def step(self, frame: Frame) -> StepMotion:
        """Next frame: the motion that led to it. Raises LocalmotionError before a reset or for another frame."""
        if not self.frames:
            raise LocalmotionError("perception: step before reset")
        grey, frame = self._check(frame), frame.copy()
        previous, previous_grey = self.frames[-1]
        if self.exact:
            self.exact.advance()
        # A simulator's pictures have no cuts. Perception has to guess them.
        if self.recipe.flow != EXACT and self.cuts.step(grey):
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

    def clip(self, steps: Sequence[StepMotion]) -> ClipMotion:
        """The motion of one episode as a clip has it: frame t holds the motion to frame t + 1.

        ``steps`` are the T >= 2 results of `reset` and `step` since the episode began. ``info`` has followed and flow, see
        `localmotion.perception.clips.ClipExtractor.extract_many`.
        """
        flow, tracks, visible, track_id = (np.stack([getattr(step, name) for step in steps[1:]]) for name in CLIP_ARRAYS)
        magnitudes = Magnitudes()
        magnitudes.add(flow)
        info = {
            "followed": round(float(visible.mean()), 4),
            "flow": {name: round(value, 5) for name, value in magnitudes.quantiles().items()},
        }
        now = shrink_points(self.slots.points, self.recipe.ratio)
        ends = np.zeros_like(flow[0]), now, np.zeros_like(visible[0]), self.slots.track_id
        flow, tracks, visible, track_id = (
            np.append(x, end[None], 0) for x, end in zip((flow, tracks, visible, track_id), ends, strict=True)
        )
        return ClipMotion(flow, tracks, visible, track_id, info)
