"""Embedded flow backend: OpenCV's DIS optical flow. No weights, no network."""

from __future__ import annotations

from typing import ClassVar

import cv2
import numpy as np
from numpy.typing import NDArray

from localmotion.errors import ConfigError
from localmotion.perception.base import register

PATCH = 8  # side of a patch in pixels; with a larger stride some pixels would have no patch


@register("flow", "dis")
class DISFlow:
    """Dense inverse search, preset MEDIUM (Kroeger et al. 2016, arXiv 1603.03590).

    The finest scale depends on the size: 0 up to 128 px (half the error of the preset's value, for four times its 1.3 ms), 1 above. OpenCV
    changes the object on its first use at a small size, so there is one object per size. They must not be shared between threads.
    """

    name: ClassVar[str] = "dis"
    licence: ClassVar[str] = "Apache-2.0"

    def __init__(
        self,
        finest_scale: int | None = None,
        patch_stride: int | None = None,
        descents: int | None = None,
        refinements: int | None = None,
        last_refinements: int = 0,
    ) -> None:
        """Settings that are None keep the preset's value.

        Args:
            finest_scale: the search ends after this many halvings of the picture; its flow is then enlarged.
            patch_stride: pixels between the patches (3).
            descents: steps of gradient descent for each patch (25).
            refinements: iterations of variational refinement at each scale (5).
            last_refinements: additional iterations at the full size, after the enlargement; for a finest scale above 0.

        ``studies/perception_truth`` has their effect on time and quality. Raises ConfigError for a value that DIS does not accept.
        """
        limits = {
            "finest_scale": (finest_scale, 0, 16),
            "patch_stride": (patch_stride, 1, PATCH),
            "descents": (descents, 1, 1000),
            "refinements": (refinements, 0, 1000),
            "last_refinements": (last_refinements, 0, 1000),
        }
        for name, (value, least, most) in limits.items():
            if value is not None and not least <= value <= most:
                raise ConfigError(f"option {name}={value} of flow backend dis must be between {least} and {most}")
        self.finest_scale, self.patch_stride, self.descents, self.refinements = finest_scale, patch_stride, descents, refinements
        self._engines: dict[tuple[int, int], cv2.DISOpticalFlow] = {}
        self._refiner = cv2.VariationalRefinement.create() if last_refinements else None
        if self._refiner:
            self._refiner.setFixedPointIterations(last_refinements)

    def _engine(self, shape: tuple[int, int]) -> cv2.DISOpticalFlow:
        if shape not in self._engines:
            engine = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
            engine.setFinestScale(self.finest_scale if self.finest_scale is not None else int(min(shape) > 128))
            if self.patch_stride is not None:
                engine.setPatchStride(self.patch_stride)
            if self.descents is not None:
                engine.setGradientDescentIterations(self.descents)
            if self.refinements is not None:
                engine.setVariationalRefinementIterations(self.refinements)
            self._engines[shape] = engine
        return self._engines[shape]

    def pair(self, first: NDArray[np.uint8], second: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Flow of one pair of grey pictures (H, W)."""
        found = self._engine(first.shape[:2]).calc(first, second, None)
        if self._refiner:
            found = self._refiner.calc(first, second, found)
        return np.asarray(found, np.float32)

    def flow(self, first: NDArray[np.uint8], second: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(N, H, W, 3) uint8 RGB twice -> (N, H, W, 2) pixels."""
        fields = np.empty((*first.shape[:3], 2), np.float32)
        for field, *pair in zip(fields, first, second, strict=True):
            field[:] = self.pair(*(cv2.cvtColor(x, cv2.COLOR_RGB2GRAY) for x in pair))
        return fields
