"""Converts decoded pictures to RGB of the requested size: chroma, colour ranges, tone mapping of HDR.

One libswscale converter per clip does colour conversion and resizing in one pass. It averages areas. With
`SWS_FULL_CHR_H_INT` it also averages the chroma planes; without it, two columns of RGB share one chroma value.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from av import VideoFrame
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from localmotion.video.libav import ERRORS, fault, memory_fault, words

_AREA, _FULL_CHR_H_INT, _FULL_CHR_H_INP, _ACCURATE_RND, _BITEXACT = 0x20, 0x2000, 0x4000, 0x40000, 0x80000
_FLAGS = _AREA | _FULL_CHR_H_INT | _FULL_CHR_H_INP | _ACCURATE_RND | _BITEXACT  # names of libswscale/swscale.h

_HDR = {16: "pq", 18: "hlg"}  # transfer characteristics of ITU-T H.273
_UNSPECIFIED, _BT2020 = 2, 9  # colour primaries and matrices of H.273
WHITE = 203.0
"""Luminance of diffuse white in HDR video, cd/m² (ITU-R BT.2408)."""
BACKDROP = 128
"""Grey behind pictures that are transparent in places."""
KNEE = 0.8
"""Share of diffuse white up to which tone mapping does not change light. Brighter light is compressed into the rest."""
_TO_BT709 = np.array(  # linear RGB of BT.2020 to that of BT.709 (ITU-R BT.2407)
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], np.float32
)
_LUMA = np.array([[0.2627, 0.6780, 0.0593]], np.float32)  # of BT.2020


def hdr_of(frame: Any) -> str:
    """ "pq" or "hlg" for a picture of high dynamic range, else ""."""
    return _HDR.get(int(frame.color_trc), "")


class Converter:
    """Turns the decoded pictures of one video into uint8 RGB.

    ``legacy``: convert as recipes of algorithm 1 and 2 do. Chroma then has half the width of the result, HDR codes are read as
    brightness, and transparency is ignored.
    """

    def __init__(self, path: Path, *, legacy: bool = False) -> None:
        self._path, self._legacy = path, legacy
        self._reformatter = VideoReformatter()

    def rgb(self, frame: Any, width: int, height: int) -> NDArray[np.uint8]:
        """One picture as (height, width, 3). Raises VideoError "unreadable" if it cannot be converted."""
        try:
            if self._legacy:
                return np.asarray(self._scaled(frame, width, height, "rgb24", _AREA).to_ndarray(), np.uint8)
            if any(component.is_alpha for component in frame.format.components):
                frame = self._opaque(frame)
            transfer = hdr_of(frame)
            if not transfer:  # same colours as rgb24 in half the time: libswscale vectorises full chroma only for planar formats
                planes = self._scaled(frame, width, height, "gbrp", _FLAGS).planes
                green, blue, red = (np.frombuffer(p, np.uint8).reshape(height, p.line_size)[:, :width] for p in planes)
                return np.asarray(cv2.merge((red, green, blue)), np.uint8)
            if frame.colorspace == _UNSPECIFIED:
                frame.colorspace = _BT2020
            wide = int(frame.color_primaries) in (_UNSPECIFIED, _BT2020)
            return tone_mapped(self._scaled(frame, width, height, "rgb48le", _FLAGS).to_ndarray(), transfer, wide=wide)
        except cv2.error as error:
            if error.code != cv2.Error.StsNoMem:
                raise
            raise memory_fault(self._path) from error
        except ERRORS as error:
            detail = f"pictures of format {frame.format.name} cannot be converted to RGB ({words(error)})"
            raise fault(self._path, "unreadable", detail, error) from error

    def _opaque(self, frame: Any) -> Any:
        """The picture over `BACKDROP`. Motion may be visible only in the transparency."""
        pixels = self._scaled(frame, frame.width, frame.height, "rgba", _FLAGS).to_ndarray()
        return VideoFrame.from_ndarray(opaque(pixels), format="rgb24")

    def _scaled(self, frame: Any, width: int, height: int, form: str, flags: int) -> Any:
        return self._reformatter.reformat(frame, width, height, form, interpolation=flags, threads=1)


def opaque(pixels: NDArray[np.uint8] | NDArray[np.uint16]) -> NDArray[np.uint8]:
    """Colours (H, W, 3) uint8 of a picture (H, W, 4) of 8 or 16 bits over `BACKDROP`: three colours in any order, then alpha."""
    codes = pixels if pixels.dtype == np.uint8 else pixels >> 8
    colour, alpha = codes[..., :3].astype(np.uint16), codes[..., 3:].astype(np.uint16)
    return ((colour * alpha + BACKDROP * (255 - alpha) + 127) // 255).astype(np.uint8)


def tone_mapped(codes: NDArray[np.uint16], transfer: str, *, wide: bool = True) -> NDArray[np.uint8]:
    """Convert an HDR picture (H, W, 3) uint16 to standard range, uint8 of the same shape.

    The codes are converted to light ("pq": SMPTE ST 2084; "hlg": ARIB STD-B67 on a display of 1000 cd/m², both as in ITU-R BT.2100),
    and ``wide`` colours to BT.709. Light up to `KNEE` of diffuse white (203 cd/m²) is unchanged, brighter light approaches 1
    exponentially. All three colours are scaled by the factor of the brightest, so hue does not change. The result has a gamma of
    2.4, as displays of standard range have (BT.1886).
    """
    light = _light(transfer)[codes]
    if transfer == "hlg":
        light *= cv2.transform(light, _LUMA)[..., None] ** 0.2 * np.float32(1000 / WHITE)
    if wide:
        light = cv2.transform(light, _TO_BT709)
    light = np.maximum(light, 0)
    peak = light.max(-1, keepdims=True)
    over = np.maximum(peak - KNEE, 0)
    kept = np.where(over > 0, KNEE + (1 - KNEE) * (1 - np.exp(over / (KNEE - 1))), peak)
    light *= kept / np.maximum(peak, 1e-6)
    return (255 * light ** (1 / 2.4) + 0.5).astype(np.uint8)


@cache
def _light(transfer: str) -> NDArray[np.float32]:
    """Light of each 16-bit code: for PQ in units of diffuse white, for HLG scene light from 0 to 1."""
    code = np.linspace(0, 1, 2**16)
    if transfer == "pq":
        power = code ** (32 / 2523)
        light = (np.maximum(power - 0.8359375, 0) / (18.8515625 - 18.6875 * power)) ** (16384 / 2610) * 10000 / WHITE
    else:
        light = np.where(code <= 0.5, code**2 / 3, (np.exp((code - 0.55991073) / 0.17883277) + 0.28466892) / 12)
    return light.astype(np.float32)
