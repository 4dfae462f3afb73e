"""Backgrounds that move behind planar bodies, with exactly known motion: the textures and shifts of ``masklam:``.

The background covers sky and floor. It is one texture a picture wide that repeats without end. It keeps its form and is shifted, so the
motion of every pixel is known. Sources: MaskLAM (arXiv 2602.02259) for backgrounds that correlate with actions; the generator is
`localmotion.envs.backgrounds.ActionShift`, with the default settings of ``masklam:``.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import cv2
import numpy as np
from numpy.typing import NDArray

from localmotion.envs.composite import Backdrop

Motion = Literal["none", "independent", "lagged", "twin", "leaky"]
MOTIONS: tuple[Motion, ...] = get_args(Motion)


class MovingBackground:
    """The texture of an episode and its current shift.

    Args:
        motion: one of `MOTIONS` except "none".
        side: S of the environment's drawn pictures, pixels.
        dims: number of actions.
        split: "train", "val" (held out) or "all" of the textures.
    """

    def __init__(self, motion: Motion, side: int, dims: int, split: str = "train") -> None:
        self._backdrop = Backdrop(motion=motion, region="scenery", videos="procedural", split=split)
        self._backdrop.open(side, dims)
        self._side = side
        self._tiles: dict[int, NDArray[np.uint8]] = {}

    def begin(self, episode_seed: int) -> None:
        """A new episode: texture, start and noise follow from its seed."""
        self._backdrop.begin(episode_seed)
        self._tiles.clear()

    def advance(self, action: NDArray[np.float64]) -> None:
        """One env step with ``action`` (A,) in [-1, 1]."""
        self._backdrop.advance(action)

    @property
    def drift(self) -> complex:
        """How far the texture has moved since the episode began, in sides of the picture; x right, imaginary part down."""
        x, y = self._backdrop.offset.tolist()
        return complex(x, y) / self._side

    def picture(self, drift: complex, side: int) -> NDArray[np.uint8]:
        """A new (side, side, 3) uint8 picture of the texture, moved by ``drift``."""
        left, upper = (-drift.real * side) % side, (-drift.imag * side) % side
        x, y = int(left), int(upper)
        # Bilinear, first across, then down: a third of the time of cv2.getRectSubPix.
        part = self._tiled(side)[y : y + side + 1, x : x + side + 1]
        part = cv2.addWeighted(part[:, :-1], 1 - left + x, part[:, 1:], left - x, 0)
        return np.asarray(cv2.addWeighted(part[:-1], 1 - upper + y, part[1:], upper - y, 0), np.uint8)

    def _tiled(self, side: int) -> NDArray[np.uint8]:
        """(2 side + 1, 2 side + 1, 3) two by two copies of the texture, and a pixel more."""
        tiles = self._tiles.get(side)
        if tiles is None:
            texture = self._backdrop.texture
            scale = len(texture) / side
            onto = np.array([[scale, 0, (scale - 1) / 2], [0, scale, (scale - 1) / 2]])  # centres of pixels to centres of pixels
            how = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
            found = cv2.warpAffine(texture, onto, (2 * side + 1, 2 * side + 1), flags=how, borderMode=cv2.BORDER_WRAP)
            tiles = self._tiles[side] = np.asarray(found, np.uint8)
        return tiles

    def describe(self) -> dict[str, Any]:
        """Motion and settings, JSON-able."""
        return self._backdrop.describe()
