"""The pictures in RUN/media as plain grids, for trackers. The report draws the same files with titles and scales, which is slower.

openloop_*    rows: truth, then each prediction, for at most three clips; columns: frames
masked_*      rows: truth, masked, reconstruction; columns: patches
traversal_*   rows: numbers of the code; columns: its values
plans_*       rows: plan, what followed, for at most three plans; columns: frames
atomic_*      as they are
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from localmotion.files import read_bytes
from localmotion.report.arrays import MAX_ARRAYS, MediaError, Pixels, flow_to_rgb, read_arrays

COLUMNS = 12


def grid(file: Path) -> bytes | None:
    """PNG of a file of RUN/media. None for a file that holds no such pictures. Raises MediaError if it cannot be shown."""
    kind = file.name.partition("_")[0] + file.suffix
    try:
        if kind == "atomic.png":
            return read_bytes(file, MAX_ARRAYS)
        if kind == "openloop.npz":
            found = read_arrays(file, ("truth", "prediction"))
            names = ["truth", *sorted(name for name in found if name.startswith("prediction"))]
            return _png([found[name][clip] for clip in range(min(3, len(found["truth"]))) for name in names])
        if kind == "masked.npz":
            found = read_arrays(file, ("truth", "masked", "reconstruction"))
            top = max(float(np.hypot(*np.moveaxis(found["truth"], -1, 0)).max()), 1e-6)
            return _png([flow_to_rgb(found[name][:COLUMNS], top) for name in ("truth", "masked", "reconstruction")], side=32)
        if kind == "traversal.npz":
            return _png(list(read_arrays(file, ("pictures",))["pictures"][:COLUMNS]))
        if kind == "plans.npz":
            found = read_arrays(file, ("plan", "followed"))
            return _png([found[name][plan] for plan in range(min(3, len(found["plan"]))) for name in ("plan", "followed")])
    except (ValueError, OSError, IndexError, TypeError, cv2.error) as error:
        raise MediaError(f"{file.name}: {error}") from error
    return None


def _png(rows: list[Pixels], side: int = 1) -> bytes:
    """Rows (n, H, W, 3) of equal n as one PNG, at most `COLUMNS` frames of each, enlarged to at least ``side`` pixels each."""
    every = -(-len(rows[0]) // COLUMNS)
    whole = np.concatenate([np.concatenate(list(row[::every]), axis=1) for row in rows])
    scale = -(-side // rows[0].shape[1])
    whole = whole.repeat(scale, 0).repeat(scale, 1)
    return bytes(cv2.imencode(".png", np.ascontiguousarray(whole[..., ::-1]))[1])
