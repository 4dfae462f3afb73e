"""Floor and sky pictures for DMC Remastered: from a folder, or procedural ones with the statistics of the originals.

The originals (Grigsby and Qi, "Measuring Visual Generalization in Continuous Control from Pixels") are 119 photographs of landscapes and
383 of grounds. `ProceduralTextures` has the same numbers. Measured over all pictures, mean (and standard deviation between pictures):

| | brightness | contrast (its std) | spectrum slope | saturation | std between rows | top minus bottom half |
|---|---|---|---|---|---|---|
| floors, original | 131 (17) | 21 (10) | -1.6 (0.5) | 75 (42) | 6.6 | 3 (8) |
| floors, procedural | 133 (16) | 19 (10) | -1.6 (0.5) | 77 (33) | 5.9 | 0 (6) |
| skies, original | 117 (35) | 50 (14) | -2.6 (0.4) | 113 (44) | 33 | 35 (42) |
| skies, procedural | 116 (31) | 49 (11) | -2.8 (0.3) | 128 (40) | 38 | 54 (30) |

(8-bit levels; the slope is that of the logarithm of the power spectrum of brightness over that of the frequency.)
"""

from __future__ import annotations

import colorsys
import functools
import hashlib
import os
from pathlib import Path
from typing import Any, Literal, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from localmotion.errors import ConfigError

Kind = Literal["floors", "skies"]
VARIABLE = "LOCALMOTION_DMCR_TEXTURES"
"""Environment variable with the folder, used if none is given."""
SIDES: dict[Kind, int] = {"floors": 150, "skies": 256}
"""Side of the pictures in pixels. A picture of 64 pixels shows a metre of floor, or a face of the sky, in fewer than 130 pixels."""
COUNTS: dict[Kind, int] = {"floors": 383, "skies": 119}
_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp")
_STREAM = 0x7E57


class Textures(Protocol):
    """Numbered floor and sky pictures."""

    def count(self, kind: Kind) -> int:
        """Number of pictures of a kind."""

    def name(self, kind: Kind, index: int) -> str:
        """Name of the picture, for people."""

    def picture(self, kind: Kind, index: int) -> NDArray[np.uint8]:
        """(S, S, 3) uint8 with S of `SIDES`. Must not be modified."""

    def describe(self) -> dict[str, Any]:
        """Their source and a hash of their list, JSON-able."""


def find_textures(folder: str | Path | None = None) -> Textures:
    """The pictures of ``folder``, or of the folder in the environment variable, or the procedural ones ("procedural" or neither given).

    Raises:
        ConfigError: the folder lacks ``floors`` or ``skies``, or one of them has no picture.
    """
    given = folder if folder is not None else os.environ.get(VARIABLE) or None
    return ProceduralTextures() if given in (None, "procedural") else FolderTextures(Path(str(given)))


class FolderTextures:
    """Pictures of ``folder/floors`` and ``folder/skies`` in the byte order of their names, so a number gives the same picture on every
    machine."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._names = folder, {kind: _list_pictures(folder, kind) for kind in SIDES}

    def count(self, kind: Kind) -> int:
        """Number of pictures of a kind."""
        return len(self._names[kind])

    def name(self, kind: Kind, index: int) -> str:
        """File name."""
        return self._names[kind][index]

    def picture(self, kind: Kind, index: int) -> NDArray[np.uint8]:
        """(S, S, 3) uint8, area-averaged to a square; kept in memory. Raises ConfigError for a file that is not a picture."""
        return _read_picture(self._folder / kind / self._names[kind][index], SIDES[kind])

    def describe(self) -> dict[str, Any]:
        """Source, numbers and a hash of names and sizes of all files, which is equal on machines with the same pictures."""
        lines = [
            f"{kind}/{name} {(self._folder / kind / name).stat().st_size}"
            for kind, names in self._names.items()
            for name in names
        ]
        digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
        return {"source": "folder", "list": digest} | {kind: self.count(kind) for kind in SIDES}


class ProceduralTextures:
    """Procedural pictures; picture i depends only on i."""

    def count(self, kind: Kind) -> int:
        """The same number as of the originals."""
        return COUNTS[kind]

    def name(self, kind: Kind, index: int) -> str:
        """Number of the picture."""
        return f"procedural {kind} {index}"

    def picture(self, kind: Kind, index: int) -> NDArray[np.uint8]:
        """(S, S, 3) uint8; kept in memory after the first call, which takes 10 to 20 ms."""
        return _procedural(kind, index)

    def describe(self) -> dict[str, Any]:
        """Source, numbers and a hash of the first picture of each kind, which changes with the procedure (and with rounding)."""
        pictures = b"".join(self.picture(kind, 0).tobytes() for kind in SIDES)
        digest = hashlib.sha256(pictures).hexdigest()[:16]
        return {"source": "procedural", "list": digest} | {kind: self.count(kind) for kind in SIDES}


def _list_pictures(folder: Path, kind: Kind) -> list[str]:
    where = folder / kind
    if not where.is_dir():
        raise ConfigError(f"textures: {where} is not a folder; give one with floors/ and skies/ in it, or leave textures out")
    names = [entry.name for entry in where.iterdir() if entry.suffix.lower() in _ENDINGS and not entry.name.startswith(".")]
    if not names:
        raise ConfigError(f"textures: {where} has no pictures ({', '.join(_ENDINGS)})")
    return sorted(names, key=os.fsencode)


@functools.lru_cache(maxsize=1024)
def _read_picture(path: Path, side: int) -> NDArray[np.uint8]:
    picture = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if picture is None:
        raise ConfigError(f"textures: {path} cannot be read as a picture; remove it or copy it again")
    if picture.shape[:2] != (side, side):
        shrinks = min(picture.shape[:2]) > side
        picture = cv2.resize(picture, (side, side), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    return _frozen(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB))


@functools.lru_cache(maxsize=1024)
def _procedural(kind: Kind, index: int) -> NDArray[np.uint8]:
    rng = np.random.default_rng([_STREAM, kind == "skies", index])
    return _frozen(_floor(rng, SIDES[kind]) if kind == "floors" else _sky(rng, SIDES[kind]))


def _frozen(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    picture = np.ascontiguousarray(picture, np.uint8)
    picture.flags.writeable = False
    return picture


# ---------------------------------------------------------------------------------------------------------- procedures


def fractal(rng: np.random.Generator, side: int, slope: float, stretch: tuple[float, float] = (1.0, 1.0)) -> NDArray[np.float64]:
    """(side, side) noise of mean 0 and variance 1 that tiles, with power proportional to frequency ** ``slope``, stretched along (y, x)."""
    fy, fx = np.fft.fftfreq(side)[:, None] * stretch[0], np.fft.rfftfreq(side)[None] * stretch[1]
    radius = np.hypot(fy, fx)
    radius[0, 0] = np.inf
    spectrum = np.fft.rfft2(rng.standard_normal((side, side))) * radius ** (slope / 2)
    field = np.fft.irfft2(spectrum, (side, side))
    return np.asarray(field / (field.std() + 1e-12))


def _colour(rng: np.random.Generator, hue: float, saturation: float, value: float, spread: float = 0.06) -> NDArray[np.float64]:
    """(3,) RGB in 0..1 near a hue, with saturation and value varied by up to a quarter."""
    s, v = np.clip(np.array([saturation, value]) * rng.uniform(0.75, 1.25, 2), 0, 1)
    return np.array(colorsys.hsv_to_rgb((hue + rng.uniform(-spread, spread)) % 1.0, float(s), float(v)))


def _levelled(picture: NDArray[np.float64], mean: float, contrast: float) -> NDArray[np.uint8]:
    """Brightness shifted to ``mean`` and its standard deviation scaled to ``contrast`` (8-bit levels), (H, W, 3) uint8."""
    grey = picture @ np.array([0.299, 0.587, 0.114])
    scale = contrast / 255 / max(float(grey.std()), 1e-6)
    levelled = (picture - grey.mean()) * min(scale, 4.0)
    # Differences between colours keep their size when the contrast is changed.
    chroma = (picture - grey[..., None]).mean(axis=(0, 1))
    levelled += chroma * (1 - min(scale, 4.0)) + mean / 255
    return (np.clip(levelled, 0, 1) * 255).round().astype(np.uint8)


def _floor(rng: np.random.Generator, side: int) -> NDArray[np.uint8]:
    """Soil, grass, gravel, leaves or bricks: fine noise between two or three colours of one family, in patches."""
    hue, saturation = ((0.10, 0.42), (0.12, 0.25), (0.24, 0.5), (0.07, 0.5), (0.6, 0.06))[
        rng.choice(5, p=[0.32, 0.24, 0.22, 0.1, 0.12])
    ]
    slope = float(np.clip(rng.normal(-1.45, 0.55), -2.6, -0.5))
    fine = fractal(rng, side, slope, (1.0, float(rng.uniform(1.0, 2.5))))
    patches = np.tanh(rng.uniform(0.3, 1.2) * fractal(rng, side, -3.0))
    first, second, third = (_colour(rng, hue, saturation, value) for value in (0.42, 0.6, 0.55))
    third = third if rng.random() < 0.7 else _colour(rng, rng.random() * 0.3, saturation, 0.6)
    blend = np.clip(0.5 + 0.22 * fine, 0, 1)[..., None]
    where = (0.5 + 0.5 * patches)[..., None] * rng.uniform(0.1, 0.6)
    picture = first * (1 - blend) + (second * (1 - where) + third * where) * blend
    if rng.random() < 0.15:  # bricks: rows of stones, each of its own tone, and joints between them
        rows, columns = int(rng.integers(8, 22)), int(rng.integers(4, 9))
        y, x = np.mgrid[0:side, 0:side] / side
        row = np.floor(y * rows).astype(np.int64)
        across = x * columns + 0.5 * (row % 2)
        tones = rng.uniform(0.8, 1.15, (rows, columns))[row, np.floor(across).astype(np.int64) % columns]
        joint = ((y * rows) % 1.0 < 0.14) | (across % 1.0 < 0.07)
        picture = picture * np.where(joint, rng.uniform(0.6, 1.3), tones)[..., None]
    elif rng.random() < 0.4:  # stones, leaves or flowers: blobs of another tone
        blobs = fractal(rng, side, -2.2) > rng.uniform(1.4, 2.4)
        picture[blobs] = 0.4 * picture[blobs] + 0.6 * _colour(rng, rng.random(), 0.3, rng.uniform(0.3, 0.9))
    return _levelled(picture, float(rng.normal(131, 16)), float(np.clip(19 * np.exp(rng.normal(0, 0.5)), 6, 55)))


def _sky(rng: np.random.Generator, side: int) -> NDArray[np.uint8]:
    """A landscape: a sky of two colours with clouds, ridges one behind the other, and a ground; or trunks of a forest."""
    down = np.linspace(0, 1, side)[:, None, None]
    hue = (0.58, 0.57, 0.07, 0.9, 0.52)[rng.integers(5)]
    above, below = _colour(rng, hue, 0.55, 0.75), _colour(rng, hue if rng.random() < 0.6 else 0.09, 0.3, 0.85)
    picture = above * (1 - down) + below * down + np.zeros((side, side, 3))
    haze = fractal(rng, side, -3.0, (1.6, 1.0))
    clouds = np.clip(rng.uniform(0, 0.5) * (haze - rng.uniform(-0.5, 1.2)), 0, 1)[..., None]
    picture += clouds * (_colour(rng, hue, 0.08, 0.95) - picture)
    rough = fractal(rng, side, -2.4)
    rows = np.arange(side)[:, None] / side
    horizon, steep = rng.uniform(0.3, 0.75), rng.uniform(0.01, 0.1)
    land_hue, land_saturation = rng.choice([0.08, 0.1, 0.28, 0.33, 0.6]), rng.uniform(0.2, 0.85)
    layers = int(rng.integers(1, 4))
    for layer in range(layers):
        profile = (
            fractal(rng, side, float(rng.uniform(-4.5, -3.0)))[0] * steep * (1.0 - layer / layers)
            + horizon
            + 0.25 * layer * (1 - horizon)
        )
        near = (layer + 1) / layers
        tone = _colour(rng, land_hue, land_saturation * (0.4 + 0.6 * near), rng.uniform(0.15, 0.7))
        weight = np.clip((rows - profile[None]) * side / 2 + 0.5, 0, 1)[..., None]
        texture = 1 + rng.uniform(0.1, 0.35) * near * (rough + 0.6 * fractal(rng, side, -2.0, (1.0, rng.uniform(0.4, 1.0))))
        picture += weight * (tone * np.clip(texture, 0.1, 2.2)[..., None] - picture)
    if rng.random() < 0.17:  # a forest: dark trunks from the top to the ground
        trunks = int(rng.integers(6, 22))
        x = np.linspace(0, 1, side)[None]
        centres, widths = rng.random(trunks)[:, None], rng.uniform(0.004, 0.03, trunks)[:, None]
        cover = np.clip((widths - np.abs(x - centres)) * side + 0.5, 0, 1).max(axis=0)[None, :, None]
        foot = np.clip((rng.uniform(0.6, 0.95) - rows) * side / 4, 0, 1)[..., None]
        bark = _colour(rng, 0.1, 0.4, rng.uniform(0.08, 0.5)) * np.clip(1 + 0.3 * rough, 0.2, 2)[..., None]
        picture += cover * foot * (bark - picture)
    grey_mean, contrast = float(np.clip(rng.normal(117, 33), 45, 200)), float(np.clip(rng.normal(52, 14), 18, 85))
    return _levelled(picture, grey_mean, contrast)
