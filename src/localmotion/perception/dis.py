"""Embedded flow backend: OpenCV's DIS optical flow. No weights, no network."""

from __future__ import annotations

from typing import ClassVar

import cv2
import numpy as np
from numpy.typing import NDArray

from localmotion.perception.base import register


@register("flow", "dis")
class DISFlow:
    """Dense inverse search, preset MEDIUM (Kroeger et al. 2016, arXiv 1603.03590).

    The finest scale is set by size: 0 up to 128 px (half the error of the preset's own for four times its 1.3 ms), 1 above. OpenCV changes
    the object on its first use at a small size, so there is one object per size; they are not safe to share between threads.
    """

    name: ClassVar[str] = "dis"
    licence: ClassVar[str] = "Apache-2.0"

    def __init__(self, finest_scale: int | None = None) -> None:
        self.finest_scale = finest_scale
        self._engines: dict[tuple[int, int], cv2.DISOpticalFlow] = {}

    def _engine(self, shape: tuple[int, int]) -> cv2.DISOpticalFlow:
        if shape not in self._engines:
            engine = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
            engine.setFinestScale(self.finest_scale if self.finest_scale is not None else int(min(shape) > 128))
            self._engines[shape] = engine
        return self._engines[shape]

    def pair(self, first: NDArray[np.uint8], second: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Flow of one pair of grey pictures (H, W)."""
        found: NDArray[np.float32] = self._engine(first.shape[:2]).calc(first, second, None)
        return found

    def flow(self, first: NDArray[np.uint8], second: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(N, H, W, 3) uint8 RGB twice -> (N, H, W, 2) pixels."""
        fields = np.empty((*first.shape[:3], 2), np.float32)
        for field, *pair in zip(fields, first, second, strict=True):
            field[:] = self.pair(*(cv2.cvtColor(x, cv2.COLOR_RGB2GRAY) for x in pair))
        return fields
