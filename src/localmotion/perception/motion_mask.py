"""Embedded mask backend: what moves in a clip, and what looks like it. No weights.

Masks are for methods that weight their loss by the agent (MaskLAM, arXiv 2602.02259, which uses a simulator or a segmentation network).
Four steps, for each scene of a clip:

1. Background motion (`_background`). It stands still, or follows the camera, or both: a floor may pass by under a still sky.
2. Evidence (`_evidence`). A frame is compared with the background: the median of the frames of the scene, or of the neighbouring frames
   moved by the camera. Flow that differs from the background's counts, too, where the picture changes.
3. Colour and place (`_refine`). Colours that are frequent where there is evidence and rare elsewhere fill parts that stand still for a
   while. The more such colours separate both, the more they count.
4. Cleaning (`_clean`): small parts are removed and small holes are filled.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from localmotion.perception.base import Frame, register
from localmotion.perception.saliency import magnitude

SIDE = 128
"""Side of the pictures that are analysed; lengths below are in pixels of such a picture."""
LEAST = 3
"""Frames of the shortest scene with masks."""
CELL = 16
"""Side of the cells of which a motion of the whole picture has most."""
TEXTURE = 3.0
"""Grey levels per pixel. Flow of plainer surroundings is a guess and says nothing of the camera."""
NEIGHBOURS = (1, 2, 3, 5, 8, 12)
"""Distances, in frames, of the pictures that make the background of a moving camera."""
PLATE_FRAMES = 101
"""Most frames whose median is a still background."""
BINS = 16
"""Bins of each colour channel."""
ROUNDS = 3
"""How often colours and places are counted."""

Matrix = NDArray[np.float64]  # (3, 3) homography
_STILL: Matrix = np.eye(3)


@register("mask", "motion")
class MotionMask:
    """Masks of what moves relative to the background. Pure function of frames and flow.

    The agent is in the mask if it moves at some time of the clip; other moving things are in it, too, and so may be strong shadows and
    reflections. A clip without any motion has empty masks, and so have scenes of fewer than three frames.

    Options:
        tolerance: grey levels by which a pixel may differ from the background.
        least_part: connected parts with less than this share of the largest part's area are removed.
    """

    name: ClassVar[str] = "motion"
    licence: ClassVar[str] = "Apache-2.0"

    def __init__(self, tolerance: float = 8.0, least_part: float = 0.1) -> None:
        self.tolerance, self.least_part = tolerance, least_part

    def masks(
        self, frames: NDArray[np.uint8], flows: NDArray[np.float32], cuts: NDArray[np.bool_], size: int
    ) -> NDArray[np.bool_]:
        """See `localmotion.perception.base.MaskBackend.masks`."""
        frames, flows = _shrink(frames, flows, max(min(frames.shape[1], SIDE), size))
        found = np.zeros((len(frames), size, size), np.bool_)
        starts = [0, *np.flatnonzero(cuts[1:]) + 1, len(frames)]
        for start, stop in itertools.pairwise(starts):
            if stop - start >= LEAST:
                found[start:stop] = self._scene(frames[start:stop], flows[start:stop], size)
        return found

    def _scene(self, frames: NDArray[np.uint8], flows: NDArray[np.float32], size: int) -> NDArray[np.bool_]:
        layers = _background(frames, flows)
        plates = [_plates(frames, layer) for layer in layers]
        evidence = _evidence(frames, flows, layers, plates, self.tolerance)
        if not (evidence > 0.5).any():
            return np.zeros((len(frames), size, size), np.bool_)
        return np.stack([_clean(chance, size, self.least_part) for chance in _refine(frames, plates, evidence)])


def _shrink(frames: NDArray[np.uint8], flows: NDArray[np.float32], side: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Frames and flow at ``side`` pixels."""
    before = frames.shape[1]
    if side == before:
        return frames, flows
    small = np.stack([cv2.resize(frame, (side, side), interpolation=cv2.INTER_AREA) for frame in frames])
    moved = np.stack([cv2.resize(flow, (side, side), interpolation=cv2.INTER_AREA) for flow in flows])
    return small, moved * np.float32(side / before)


# ------------------------------------------------------------------------------------------------- motion of the background


def _background(frames: NDArray[np.uint8], flows: NDArray[np.float32]) -> list[list[Matrix]]:
    """The motions that the background of a scene has: for each, T homographies from the frame before."""
    found = [(_STILL, "none")]
    found += [_camera(frames[t - 1], frames[t], flows[t]) for t in range(1, len(frames))]
    kinds = [kind for _, kind in found[1:]]
    moving = kinds.count("part") + kinds.count("all")
    layers = [[matrix for matrix, _ in found]] if moving >= 0.05 * len(kinds) else []
    if not layers or kinds.count("all") <= kinds.count("part"):
        layers.append([_STILL] * len(frames))
    return layers


def _camera(before: Frame, after: Frame, flow: NDArray[np.float32]) -> tuple[Matrix, str]:
    """A motion of the background between two frames, and of how much of it: "all", "part" or "none".

    A motion of textured points is the background's if it fits points in most of the picture, or if it spans the picture from side to
    side, explains the points' colours better than no motion does, and is more than a third of a pixel. Agents seldom do.
    """
    side = len(before)
    stride = max(side // 32, 1)
    ys, xs = np.mgrid[0:side:stride, 0:side:stride].reshape(2, -1)
    points, shift = np.stack([xs, ys], -1).astype(np.float32), flow[ys, xs]
    textured = cv2.dilate(_gradient(_grey(before)), np.ones((3, 3), np.uint8))[ys, xs] > TEXTURE
    moves = textured & (np.abs(shift).max(1) > 0.1)
    if np.count_nonzero(moves) < 12:
        return _STILL, "none"
    start, end = points[moves], points[moves] + shift[moves]
    matrix, _ = cv2.findHomography(start, end, cv2.USAC_MAGSAC, 0.5, maxIters=200, confidence=0.99)
    if matrix is not None:
        fits = moves & (_miss(matrix, points, shift) < 0.5 + 0.1 * magnitude(shift))
        cells = np.unique(xs[fits] // CELL + 1000 * (ys[fits] // CELL))
        if len(cells) >= 0.6 * (side / CELL) ** 2:
            return matrix, "all"
    affine, _ = cv2.estimateAffine2D(start, end, method=cv2.RANSAC, ransacReprojThreshold=0.5, maxIters=500, confidence=0.99)
    if affine is None:
        return _STILL, "none"
    matrix = np.vstack([affine, [0.0, 0.0, 1.0]])
    fits = moves & (_miss(matrix, points, shift) < 0.5)
    if np.count_nonzero(fits) < max(0.1 * np.count_nonzero(textured), 1) or np.median(magnitude(shift[fits])) <= 0.3:
        return _STILL, "none"
    spans = max(np.count_nonzero(np.bincount(axis[fits] * 4 // side) >= 2) for axis in (xs, ys)) == 4
    errors = [
        np.minimum(cv2.absdiff(picture, after).max(-1)[ys[fits], xs[fits]], 30).mean()
        for picture in (_warp(before, matrix), before)
    ]
    return (matrix, "part") if spans and errors[0] < 0.8 * errors[1] else (_STILL, "none")


def _inverse(matrix: Matrix) -> Matrix:
    return np.asarray(np.linalg.inv(matrix), np.float64)


def _miss(matrix: Matrix, points: NDArray[np.float32], shift: NDArray[np.float32]) -> NDArray[np.float32]:
    """Distance (n,) of points after a homography from points after their shift."""
    return magnitude(cv2.perspectiveTransform(points[None], matrix)[0] - points - shift)


def _warp(picture: NDArray[np.uint8], matrix: Matrix, border: Frame | None = None) -> NDArray[np.uint8]:
    """A picture moved by a homography; outside it is ``border``'s picture, or black."""
    size = picture.shape[1::-1]
    if border is None:
        return np.asarray(cv2.warpPerspective(picture, matrix, size), np.uint8)
    out = border.copy()
    return np.asarray(cv2.warpPerspective(picture, matrix, size, dst=out, borderMode=cv2.BORDER_TRANSPARENT), np.uint8)


def _plates(frames: NDArray[np.uint8], layer: Sequence[Matrix]) -> Sequence[Frame]:
    """The background (H, W, 3) of each frame under one motion of the background."""
    length = len(frames)
    if all(matrix is _STILL for matrix in layer):
        chosen = np.unique(np.linspace(0, length - 1, min(length, PLATE_FRAMES)).round().astype(int))
        return [np.median(frames[chosen], 0).astype(np.uint8)] * length
    since = [layer[0]]
    for matrix in layer[1:]:
        since.append(matrix @ since[-1])
    plates = []
    for t, frame in enumerate(frames):
        near = [t + sign * k for k in NEIGHBOURS for sign in (1, -1) if 0 <= t + sign * k < length]
        moved = [_warp(frames[k], since[t] @ _inverse(since[k]), frame) for k in near]
        plates.append(np.median(np.stack(moved), 0).astype(np.uint8))
    return plates


# ------------------------------------------------------------------------------------------------------------- evidence


def _evidence(
    frames: NDArray[np.uint8],
    flows: NDArray[np.float32],
    layers: list[list[Matrix]],
    plates: list[Sequence[Frame]],
    tolerance: float,
) -> NDArray[np.float32]:
    """(T, H, W) in [0, 1]: how surely each pixel is not background. A pixel that any motion of the background explains has none."""
    differs: NDArray[np.float32] | None = None
    drifts: NDArray[np.float32] | None = None
    for layer, ground in zip(layers, plates, strict=True):
        difference = np.stack([cv2.absdiff(frame, plate).max(-1) for frame, plate in zip(frames, ground, strict=True)])
        noise = float(np.median(difference[:, ::4, ::4]))
        # A plate of moved frames is off by a fraction of a pixel.
        slack = 0.3 if all(matrix is _STILL for matrix in layer) else 1.0
        one, two = np.empty(difference.shape, np.float32), np.empty(difference.shape, np.float32)
        for t, (frame, plate) in enumerate(zip(frames, ground, strict=True)):
            allowed = tolerance + noise + slack * _gradient(_grey(plate))
            light = np.where(_shadow(frame, plate), np.float32(0.5), np.float32(1))
            one[t] = np.clip((difference[t] / allowed - 1) / 2, 0, 1) * light
            two[t] = _drift(frames, flows, layer, t) * light
        differs = one if differs is None else np.minimum(differs, one)
        drifts = two if drifts is None else np.minimum(drifts, two)
    assert differs is not None
    assert drifts is not None
    for one, two in zip(differs, drifts, strict=True):
        one[:] = 1 - (1 - cv2.GaussianBlur(one, (0, 0), 0.7)) * (1 - 0.5 * cv2.GaussianBlur(two, (0, 0), 1.0))
    return differs


def _drift(frames: NDArray[np.uint8], flows: NDArray[np.float32], layer: list[Matrix], t: int) -> NDArray[np.float32]:
    """(H, W) in [0, 1]: flow of frame ``t`` relative to the background, where the picture changes before and after."""
    side = frames.shape[1]
    ys, xs = np.mgrid[0:side, 0:side].astype(np.float32)
    grid = np.stack([xs, ys], -1).reshape(1, -1, 2)
    step = min(t + 1, len(frames) - 1)
    moved = cv2.perspectiveTransform(grid, layer[step]) - grid
    size = magnitude(flows[step] - moved.reshape(side, side, 2))
    others: list[tuple[int, Matrix]] = [(t - 1, layer[t])] if t else []
    others += [(t + 1, _inverse(layer[t + 1]))] if t + 1 < len(frames) else []
    change = np.full((side, side), 255, np.uint8)
    for other, matrix in others:
        change = np.minimum(change, cv2.absdiff(frames[t], _warp(frames[other], matrix, frames[t])).max(-1))
    gate = np.minimum(cv2.GaussianBlur(change.astype(np.float32), (0, 0), 1.0) / 6, 1)
    drift: NDArray[np.float32] = np.clip((size - 0.15) / 0.65, 0, 1) * gate
    return drift


def _shadow(frame: Frame, plate: Frame) -> NDArray[np.bool_]:
    """(H, W) pixels that have the background's colour and 50 to 100 % of its light."""
    now, then = frame.astype(np.float32), plate.astype(np.float32)
    light = (now.sum(-1) + 10) / (then.sum(-1) + 10)
    shadow: NDArray[np.bool_] = (light > 0.5) & (light < 1) & (np.abs(now - then * light[..., None]).max(-1) < 6)
    return shadow


def _grey(picture: Frame) -> NDArray[np.float32]:
    return np.asarray(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), np.float32)


def _gradient(grey: NDArray[np.float32]) -> NDArray[np.float32]:
    """(H, W) grey levels per pixel."""
    x, y = (cv2.Sobel(grey, cv2.CV_32F, dx, 1 - dx, scale=1 / 8) for dx in (1, 0))
    size: NDArray[np.float32] = np.sqrt(x * x + y * y)
    return size


# ------------------------------------------------------------------------------------------------------ colour and place


class _Counts(NamedTuple):
    """Colours of the agent and of the rest, (BINS^3,) each, and the agent's share of all pixels."""

    agent: NDArray[np.float64]
    rest: NDArray[np.float64]
    share: float


def _count(codes: NDArray[np.uint16], chance: NDArray[np.float32]) -> _Counts:
    """Count colours, each pixel by its squared chance to be the agent's or not."""
    counts = []
    for weight in (chance * chance, (1 - chance) * (1 - chance)):
        table = np.bincount(codes.ravel(), weight.ravel(), BINS**3).astype(np.float64)
        counts.append(_smooth(table.reshape(BINS, BINS, BINS)).ravel())
    agent, rest = counts
    return _Counts(agent, rest, float(np.clip(agent.sum() / (agent.sum() + rest.sum()), 0.001, 0.5)))


def _smooth(table: NDArray[np.float64]) -> NDArray[np.float64]:
    """A table of three axes, spread over neighbouring bins (a Gaussian of 0.8 bins)."""
    kernel = np.exp(-0.5 * (np.arange(-3, 4) / 0.8) ** 2)
    kernel /= kernel.sum()
    for axis in range(3):
        lined = np.pad(np.moveaxis(table, axis, 0), ((3, 3), (0, 0), (0, 0)), mode="symmetric")
        table = np.moveaxis(sum(k * lined[i : i + BINS] for i, k in enumerate(kernel)), 0, axis)
    return table


def _codes(pictures: NDArray[np.uint8]) -> NDArray[np.uint16]:
    """(..., H, W) the bin of each pixel's colour."""
    red, green, blue = np.moveaxis(pictures.astype(np.uint16) * BINS // 256, -1, 0)
    return np.asarray((red * BINS + green) * BINS + blue, np.uint16)


def _refine(frames: NDArray[np.uint8], plates: list[Sequence[Frame]], evidence: NDArray[np.float32]) -> NDArray[np.float32]:
    """(T, H, W) chance of each pixel to be the agent's, from evidence, colour and place.

    Where the agent rests for most of a scene, it is in the plate, and the ground differs from the plate when the agent has left. Such
    evidence does not count: the plate has more of the agent's colour than the frame.
    """
    codes = _codes(frames)
    chance, trust = evidence, -1.0
    for _ in range(ROUNDS):
        counts = _count(codes, chance)
        if trust < 0:
            pure = counts.agent / (counts.agent + counts.rest + 1e-9)
            trust = min(5 * float((counts.agent * pure).sum() / counts.agent.sum()), 1.0)
        colour = np.log((counts.agent + 20 * counts.share) / (counts.rest + 20 * (1 - counts.share)))
        colour = (trust * colour - 1.5 * (1 - trust)).astype(np.float32)
        place = cv2.GaussianBlur(chance.mean(0), (0, 0), 4.0)
        place = np.log((place + 1e-3) / (1 - place + 1e-3)) - np.log(counts.share / (1 - counts.share))
        after = np.empty_like(evidence)
        for t in range(len(frames)):
            own = colour[codes[t]]
            left = np.minimum.reduce([colour[_codes(ground[t])] for ground in plates]) > own + 2
            odds = own + 0.7 * place + 3 * (np.where(left, 0, evidence[t]) - 0.3)
            odds = cv2.GaussianBlur(np.clip(odds, -8, 8).astype(np.float32), (0, 0), 0.4 + 0.8 * (1 - trust))
            after[t] = 1 / (1 + np.exp(-odds))
        chance = after
    return chance


def _clean(chance: NDArray[np.float32], size: int, least_part: float) -> NDArray[np.bool_]:
    """The mask (size, size) of a chance (H, W): more than half, without small parts and holes."""
    small = chance if len(chance) == size else cv2.resize(chance, (size, size), interpolation=cv2.INTER_AREA)
    mask = small > 0.5
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    areas = stats[:, cv2.CC_STAT_AREA].copy()
    areas[0] = 0
    keep = areas >= max(least_part * areas.max(), 4)
    keep[0] = False
    mask = keep[labels]
    count, labels, stats, _ = cv2.connectedComponentsWithStats((~mask).astype(np.uint8), connectivity=4)
    holes = (stats[:, cv2.CC_STAT_AREA] <= 4) & (np.arange(count) > 0)
    filled: NDArray[np.bool_] = mask | holes[labels]
    return filled
