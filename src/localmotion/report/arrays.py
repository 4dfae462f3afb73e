"""Arrays of RUN/media, read without pickle and bounded in size, and flow as colour. Imports neither torch nor matplotlib."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from localmotion.errors import LocalmotionError
from localmotion.files import one_line

Pixels = NDArray[np.uint8]
HIDDEN = (148, 152, 160)
MAX_ARRAYS = 1 << 28
"""Largest total size of the arrays in one file, bytes."""


class MediaError(LocalmotionError):
    """A file of RUN/media that cannot be shown."""


def read_arrays(path: Path, names: tuple[str, ...]) -> dict[str, NDArray[Any]]:
    """All arrays of an npz file. Raises MediaError if it is damaged, too large, holds objects or lacks a name.

    The sizes in the archive and in each array's header are added up before anything is allocated.
    """
    try:
        if not path.is_file():
            raise ValueError("not a regular file")
        with zipfile.ZipFile(path) as archive:
            size = sum(_claimed(archive, entry) for entry in archive.infolist())
        if size > MAX_ARRAYS:
            raise MediaError(f"{path.name}: holds {size / 2**30:.1f} GB of arrays, more than a report reads")
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except MediaError:
        raise
    except Exception as error:  # zip, its compressors, and numpy's header parser have different error types
        raise MediaError(f"{path.name}: cannot be read ({one_line(str(error) or 'damaged', 120)})") from error
    if missing := [name for name in names if name not in arrays]:
        raise MediaError(f"{path.name}: lacks {', '.join(missing)}")
    return arrays


def _claimed(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> int:
    """Bytes needed to read one array: by the archive or by its own header, the larger of both."""
    with archive.open(entry) as part:
        version = np.lib.format.read_magic(part)
        head = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = head(part)
    return max(entry.file_size, math.prod(shape) * dtype.itemsize)


# The wheel of Baker et al., "A Database and Evaluation Methodology for Optical Flow" (2011): arcs between six pure
# hues, with lengths by the number of steps that the eye can distinguish.
_WHEEL_AT = np.cumsum([0, 15, 6, 4, 11, 13, 6]) / 55.0
_WHEEL = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 1, 1], [0, 0, 1], [1, 0, 1], [1, 0, 0]], dtype=np.float64)


def flow_to_rgb(flow: ArrayLike, max_magnitude: float) -> Pixels:
    """Colour of motion: (..., 2) flow in pixels (x right, y down) -> (..., 3) uint8.

    Hue is direction (red: right, then clockwise through yellow, green, cyan and blue), saturation is magnitude up to
    ``max_magnitude``, white is no motion. Non-finite vectors are grey. Raises ValueError for another last dimension,
    or a ``max_magnitude`` that is not positive.
    """
    field = np.asarray(flow, dtype=np.float64)
    if field.ndim < 1 or field.shape[-1] != 2:
        raise ValueError(f"flow must be (..., 2), not {field.shape}")
    if not max_magnitude > 0:
        raise ValueError(f"max_magnitude must be positive, not {max_magnitude}")
    known = np.asarray(np.isfinite(field).all(axis=-1))
    field = np.where(known[..., None], field, 0.0)
    turn = np.arctan2(field[..., 1], field[..., 0]) / (2 * math.pi) % 1.0
    strength = np.minimum(np.hypot(field[..., 0], field[..., 1]) / max_magnitude, 1.0)[..., None]
    hue = np.stack([np.interp(turn, _WHEEL_AT, _WHEEL[:, c]) for c in range(3)], axis=-1)
    colour = np.rint(255 * (1 - strength * (1 - hue))).astype(np.uint8)
    return np.where(known[..., None], colour, np.array(HIDDEN, dtype=np.uint8))
