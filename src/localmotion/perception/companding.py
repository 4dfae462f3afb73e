"""Flow in one byte per number, for the replay: small steps for small motion, large steps for large motion.

A million DRP transitions hold 16 GB of flow in float16, more than all their pictures. Flow is an estimate with errors of a tenth of a pixel
and more, so most of those bits are noise. The code is linear below `KNEE` and logarithmic above it (like mu-law in telephony):

    code = round(127 sign(v) ln(1 + |v| / KNEE) / ln(1 + limit / KNEE))

With a limit of 64 pixels the step is 0.002 pixels at rest and the error is at most 3 % of the motion elsewhere.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from localmotion.errors import LocalmotionError

KNEE = 0.032
"""Pixels. Far below the resolution of any flow backend."""


class Companding:
    """Coder between flow in pixels (float16) and int8. Decoding a code and encoding the result gives the same code.

    Args:
        limit: largest magnitude of a component, pixels. Use the side of the picture, because nothing that moves further is visible.
            Larger values (wrong estimates) are clipped to the limit.
    """

    dtype = np.dtype(np.int8)

    def __init__(self, limit: float) -> None:
        self.limit = limit
        scale = np.log1p(limit / KNEE) / 127
        codes = np.arange(256, dtype=np.uint8).view(np.int8).astype(np.float64)
        self.table = (np.sign(codes) * KNEE * np.expm1(np.abs(codes) * scale)).astype(np.float16)
        # float16 has only 65,536 numbers: so a table holds all their codes. -128 is not a code: it marks NaN.
        values = np.arange(65536, dtype=np.uint32).astype(np.uint16).view(np.float16).astype(np.float64)
        bounded = np.clip(np.nan_to_num(values, nan=0.0), -limit, limit)
        found = np.sign(bounded) * np.round(np.log1p(np.abs(bounded) / KNEE) / scale)
        self._encoded = np.where(np.isnan(values), -128, found).astype(np.int8)

    def encode(self, flow: NDArray[np.float16]) -> NDArray[np.int8]:
        """Codes of flow, any shape. Raises LocalmotionError if a value is NaN."""
        codes = self._encoded[np.ascontiguousarray(flow, np.float16).view(np.uint16)]
        if (codes == -128).any():
            raise LocalmotionError("flow holds values that are not numbers; the flow backend is broken or got a broken picture")
        return codes

    def decode(self, codes: NDArray[np.int8]) -> NDArray[np.float16]:
        """Flow in pixels of codes, same shape."""
        if not codes.size:
            return np.zeros(codes.shape, np.float16)
        # OpenCV needs only a table of two-byte entries, and is six times faster than indexing.
        found = cv2.LUT(codes.reshape(1, -1).view(np.uint8), self.table.view(np.uint16)[None])
        return np.asarray(found).view(np.float16).reshape(codes.shape)
