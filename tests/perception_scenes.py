"""Scenes of known motion for the tests of perception."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

SIDE = 128


def texture(seed: int, side: int = SIDE) -> NDArray[np.uint8]:
    """(side, side, 3) smooth noise that can be followed."""
    noise = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return ((cv2.GaussianBlur(noise, (0, 0), 2.0).astype(np.float32) - 100) * 3).clip(0, 255).astype(np.uint8)


def scene(
    frames: int = 12, velocity: tuple[float, float] = (2.0, 1.0), camera: tuple[float, float] = (0.0, 0.0), side: int = SIDE
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """A textured square of 40 px over a textured ground, both shifted with sub-pixel accuracy; frames and object masks."""
    ground, patch = texture(1, 2 * side), texture(2, 40)
    out, masks = [], []
    for t in range(frames):
        move = np.float32([[1, 0, -40 + camera[0] * t], [0, 1, -40 + camera[1] * t]])
        frame = cv2.warpAffine(ground, move, (side, side), flags=cv2.INTER_LINEAR)
        place = np.float32([[1, 0, 20 + velocity[0] * t], [0, 1, 30 + velocity[1] * t]])
        mask = cv2.warpAffine(np.ones((40, 40), np.float32), place, (side, side))
        front = cv2.warpAffine(patch, place, (side, side), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        out.append((front * mask[..., None] + frame * (1 - mask[..., None])).astype(np.uint8))
        masks.append(mask > 0.99)
    return np.stack(out), np.stack(masks)


def share_on(mask: NDArray[np.bool_], points: NDArray[np.float32], margin: int = 4) -> float:
    """Share of (N, 2) points on a mask of the same picture, with a margin in pixels."""
    near = cv2.dilate(mask.astype(np.uint8), np.ones((2 * margin + 1, 2 * margin + 1))) > 0
    at = np.round(points).astype(int).clip(0, np.array(mask.shape[::-1]) - 1)
    return float(near[at[:, 1], at[:, 0]].mean())
