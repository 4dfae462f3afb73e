"""Masks in a clip store: one bit a pixel, each row packed by itself."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from localmotion.video.shards import Extra


def mask_layout(size: int) -> Extra:
    """The further array of a store with masks of side ``size``: ``mask``, (size, ceil(size/8)) uint8 a frame."""
    return {"mask": ("|u1", (size, -(-size // 8)))}


def pack(masks: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Masks (..., H, W) -> (..., H, ceil(W/8)) uint8, the first column in the highest bit (`numpy.packbits`)."""
    return np.packbits(masks, axis=-1)


def unpack(packed: NDArray[np.uint8], size: int) -> NDArray[np.bool_]:
    """Masks (..., H, size) from `pack`'s bytes (..., H, ceil(size/8))."""
    return np.unpackbits(packed, axis=-1, count=size).astype(np.bool_)
