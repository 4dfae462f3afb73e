"""Real (or procedural) pictures moved by known warps, as a yardstick of flow and tracks that no renderer flatters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from localmotion.envs.truth import pixel_grid
from localmotion.errors import unknown_name
from localmotion.perception.points import draw_points, texture_weight
from localmotion.perception_eval.scores import FlowScore, TrackScore
from localmotion.video.decode import iter_frames
from localmotion.video.listing import usable_videos

WARPS: dict[str, tuple[str, float]] = {
    "shift 0.05": ("shift", 0.05),
    "shift 0.2": ("shift", 0.2),
    "shift 1": ("shift", 1.0),
    "shift 4": ("shift", 4.0),
    "turn 0.5": ("turn", 0.5),
    "turn 2": ("turn", 2.0),
    "turn 8": ("turn", 8.0),
    "zoom 1.005": ("zoom", 1.005),
    "zoom 1.03": ("zoom", 1.03),
    "zoom 1.1": ("zoom", 1.1),
}
"""Name -> kind and amount: pixels of the stored picture, degrees, factor."""
PICTURES = 8


def load_pictures(path: Path | None, count: int = PICTURES, side: int = 384) -> list[NDArray[np.uint8]]:
    """``count`` square pictures (side, side, 3): first frames of videos spread over a folder, frames of one video, or procedural ones.

    Raises VideoError for a path without videos or one that cannot be read.
    """
    if path is None:
        return [_procedural(seed, side) for seed in range(count)]
    refs = usable_videos(path)
    if len(refs) >= count:
        chosen = [refs[int(k)] for k in np.linspace(0, len(refs) - 1, count).round()]
        found = [next(iter_frames(ref, None)) for ref in chosen]
    else:
        each = -(-count // len(refs))
        found = [frame for ref in refs for frame in iter_frames(ref, None, 10, max_frames=each)][:count]
    return [_square(frame, side) for frame in found]


def _square(picture: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    height, width = picture.shape[:2]
    least = min(height, width)
    y, x = (height - least) // 2, (width - least) // 2
    how = cv2.INTER_AREA if least > side else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(picture[y : y + least, x : x + least], (side, side), interpolation=how), np.uint8)


def _procedural(seed: int, side: int) -> NDArray[np.uint8]:
    """Noise whose power falls with the square of frequency, as in photographs, with some hard-edged shapes on it."""
    rng = np.random.default_rng([31, seed])
    picture = np.zeros((side, side, 3), np.float32)
    for octave in range(2, 8):
        cells = 2**octave
        noise = rng.normal(0, 1, (cells, cells, 3)).astype(np.float32)
        picture += cv2.resize(noise, (side, side), interpolation=cv2.INTER_CUBIC) / octave
    picture = np.clip(128 + 60 * picture, 0, 255)
    for _ in range(12):
        corners = rng.uniform(0, side, 2) + rng.uniform(-0.15, 0.15, (4, 2)) * side
        cv2.fillConvexPoly(picture, cv2.convexHull(corners.astype(np.int32)), rng.uniform(0, 255, 3).tolist())
    return np.rint(picture).astype(np.uint8)


def warp_pair(
    picture: NDArray[np.uint8], side: int, kind: str, amount: float, direction: float = 0.0
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.float32], NDArray[np.bool_]]:
    """Two pictures (side, side, 3) of a larger one, the motion between them known: first, second, flow (side, side, 2), valid.

    Each is drawn from the middle two thirds of ``picture`` at twice the side, moved by half the warp, and area-averaged: both are equally
    sharp. ``kind`` and ``amount``: shift by pixels of ``side`` along ``direction`` (radians), turn by degrees, zoom by a factor.
    """
    if kind == "shift":
        matrix, shift = np.eye(2), amount / 2 * np.array([np.cos(direction), np.sin(direction)])
    elif kind == "turn":
        half = np.radians(amount) / 2
        matrix, shift = np.array([[np.cos(half), -np.sin(half)], [np.sin(half), np.cos(half)]]), np.zeros(2)
    elif kind == "zoom":
        matrix, shift = np.eye(2) * np.sqrt(amount), np.zeros(2)
    else:
        raise unknown_name("warp", kind, ("shift", "turn", "zoom"))
    picture = _square(picture, 3 * side)
    middle, canvas = (side - 1) / 2, (len(picture) - 1) / 2
    scale = 2.0  # pixels of the picture per pixel of the result
    back = np.linalg.inv(matrix)
    drawn = []
    for linear, offset in ((matrix, shift), (back, -shift)):
        # From pixel q of the doubled drawing to the source; (q + 1/2) / 2 - 1/2 is its place in the result.
        turned = scale * linear / 2
        start = canvas + scale * (linear @ (np.full(2, -0.25 - middle)) + offset)
        move = np.column_stack([turned, start]).astype(np.float64)
        how = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
        doubled = cv2.warpAffine(picture, move, (2 * side, 2 * side), flags=how, borderMode=cv2.BORDER_REFLECT)
        drawn.append(np.asarray(cv2.resize(doubled, (side, side), interpolation=cv2.INTER_AREA), np.uint8))
    grid = pixel_grid(side) - middle
    flow = grid @ (matrix @ matrix).T + 2 * shift - grid
    inside = (np.abs(grid + flow) <= middle + 0.5).all(1)
    return drawn[0], drawn[1], flow.reshape(side, side, 2).astype(np.float32), inside.reshape(side, side)


def score_warps(
    pictures: Sequence[NDArray[np.uint8]], tools: dict[str, dict[str, Any]], percept: int, size: int, seed: int
) -> dict[str, Any]:
    """By warp: flow numbers of each flow backend and one-step numbers of each track backend that steps frame by frame."""
    ratio, out = percept // size, {}
    for name, (kind, amount) in WARPS.items():
        flows = {key: FlowScore(ratio) for key in tools["flow"]}
        tracks = {key: TrackScore(ratio) for key, backend in tools["track"].items() if backend.causal}
        rng = np.random.default_rng([seed, 3])
        for picture in pictures:
            direction, sign = float(rng.uniform(0, 2 * np.pi)), 1 if rng.random() < 0.5 else -1
            moved = {"shift": amount * ratio, "turn": sign * amount, "zoom": amount**sign}[kind]
            first, second, flow, valid = warp_pair(picture, percept, kind, moved, direction)
            start = draw_points(texture_weight(cv2.cvtColor(first, cv2.COLOR_RGB2GRAY)), 64, rng)
            for key, score in flows.items():
                score.add(tools["flow"][key].flow(first[None], second[None])[0], flow, valid, np.ones_like(valid))
            at = cv2.remap(flow, start[:, 0], start[:, 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE).reshape(-1, 2)
            paths = np.stack([start, start + at])
            seen = np.ones((2, len(start)), bool)
            seen[1] = ((paths[1] >= -0.5) & (paths[1] <= percept - 0.5)).all(1)
            for key, tracked in tracks.items():
                found, kept = tools["track"][key].track(np.stack([first, second]), start)
                tracked.add(found, kept, paths, seen)
        out[name] = {
            "flow": {key: {k: v for k, v in score.numbers().items() if k != "bins"} for key, score in flows.items()},
            "track": {key: tracked.numbers() for key, tracked in tracks.items()},
        }
    return out
