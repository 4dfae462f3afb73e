"""Embedded foreground backend: motion that the camera does not explain. No weights."""

from __future__ import annotations

from typing import ClassVar

import cv2
import numpy as np
from numpy.typing import NDArray

from localmotion.perception.base import register


def residual_flow(flow: NDArray[np.float32], grid_side: int = 16) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Flow minus the motion of the camera, and the camera's flow, both (H, W, 2).

    The camera's motion is a robust homography (USAC MAGSAC) between a grid and where the flow takes it. If none fits, it is taken as still.
    """
    height, width = flow.shape[:2]
    stride = max(min(height, width) // grid_side, 1)  # 256 points settle 8 parameters; more only cost time
    ys, xs = np.mgrid[0:height:stride, 0:width:stride]
    start = np.stack([xs, ys], -1).reshape(-1, 2).astype(np.float32)
    shift = flow[::stride, ::stride].reshape(-1, 2)
    if np.abs(shift).max() < 1e-3:
        return flow, np.zeros_like(flow)
    cv2.setRNGSeed(0)
    matrix, _ = cv2.findHomography(start, start + shift, cv2.USAC_MAGSAC, 0.5, maxIters=200, confidence=0.99)
    if matrix is None:
        return flow, np.zeros_like(flow)
    ys, xs = np.mgrid[0:height, 0:width].astype(np.float32)
    grid = np.stack([xs, ys], -1)
    camera = cv2.perspectiveTransform(grid.reshape(1, -1, 2), matrix).reshape(height, width, 2) - grid
    if not np.isfinite(camera).all() or np.abs(camera).max() > max(height, width):
        return flow, np.zeros_like(flow)
    return flow - camera, camera


@register("segment", "saliency")
class MotionSaliency:
    """Magnitude of the residual flow, median over the given fields, weighted up inside its largest connected parts (Otsu).

    It is a sampling weight, not a mask: on tiny or slow objects hard masks fail where a weight still prefers them.
    """

    name: ClassVar[str] = "saliency"
    licence: ClassVar[str] = "Apache-2.0"
    uses_motion: ClassVar[bool] = True

    def __init__(self, floor: float = 0.05, outside: float = 0.1) -> None:
        self.floor, self.outside = floor, outside

    def weight(self, frames: NDArray[np.uint8], flows: NDArray[np.float32]) -> NDArray[np.float32]:
        """(H, W) in [0, 1]; all zero when nothing moves more than ``floor`` pixels against the camera."""
        shape = frames.shape[1:3]
        if len(flows) == 0:
            return np.zeros(shape, np.float32)
        sizes = np.stack([np.linalg.norm(residual_flow(flow)[0], axis=-1) for flow in flows])
        size = cv2.GaussianBlur(np.median(sizes, 0).astype(np.float32), (0, 0), 1.0)
        top = float(np.quantile(size, 0.995))
        if top < self.floor:
            return np.zeros(shape, np.float32)
        scaled = np.clip(size / top, 0, 1)
        _, mask = cv2.threshold((scaled * 255).astype(np.uint8), 0, 1, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
        count, labels, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
        if count > 1:
            area = stats[:, cv2.CC_STAT_AREA].copy()
            area[0] = 0
            keep = area >= 0.1 * area.max()
            mask = (keep[labels] & (mask > 0)).astype(np.uint8)
        weight: NDArray[np.float32] = scaled * np.where(mask > 0, 1.0, self.outside).astype(np.float32)
        weight[size < self.floor] = 0.0
        return weight
