"""Mask backends against the agent's exact masks of environments, and against the masks of a video segmentation data set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from localmotion.errors import ConfigError, LocalmotionError
from localmotion.perception_eval.scores import OverlapScore

MASK_ENVS: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("planar:walker_run", {}),
    ("planar:walker_run", {"background": "independent"}),
    ("dmc:walker_run", {}),
    ("toy:block", {}),
)
"""Environments with options."""
SET_FRAMES = 100
"""Most frames of a video of a data set."""
PICTURES = (".jpg", ".jpeg", ".png")


class Masked(NamedTuple):
    """A clip with its true masks."""

    frames: NDArray[np.uint8]  # (T, P, P, 3)
    masks: NDArray[np.bool_]  # (T, S, S)


def score_masks(clips: Iterator[Masked], backends: Mapping[str, Any], flow: Any) -> dict[str, dict[str, float]]:
    """`OverlapScore.numbers` of each backend over all clips, with the flow of ``flow``."""
    scores = {name: OverlapScore() for name in backends}
    for clip in clips:
        flows = np.zeros((*clip.frames.shape[:3], 2), np.float32)
        flows[1:] = flow.flow(clip.frames[:-1], clip.frames[1:])
        cuts = np.zeros(len(flows), np.bool_)
        for name, backend in backends.items():
            scores[name].add(backend.masks(clip.frames, flows, cuts, clip.masks.shape[1]), clip.masks)
    return {name: score.numbers() for name, score in scores.items()}


def pictures_of(masks: Path) -> Path:
    """The folder of frames beside a folder of masks: of DAVIS's layout (JPEGImages beside Annotations), or ``frames`` beside ``masks``.

    Raises ConfigError if there is none.
    """
    parts = masks.resolve().parts
    found = [
        Path(*parts[:k], name, *parts[k + 1 :])
        for k in range(len(parts) - 1, 0, -1)
        for name in (("JPEGImages",) if parts[k] == "Annotations" else ("JPEGImages", "frames") if k == len(parts) - 1 else ())
    ]
    for folder in found:
        if folder.is_dir():
            return folder
    raise ConfigError(
        f"{masks}: no frames beside these masks; put them into a folder JPEGImages beside Annotations, as DAVIS does, or into a folder"
        " frames beside this one"
    )


def read_set(masks: Path, percept: int, size: int) -> Iterator[tuple[str, Masked]]:
    """The videos of a data set: name, frames at ``percept`` and masks at ``size`` pixels.

    Each folder below ``masks`` holds the masks of one video, one picture a frame, in which any value but 0 is an object. The frames have
    the same names. Raises ConfigError for folders without such pairs, LocalmotionError for pictures that cannot be read.
    """
    if not masks.is_dir():
        raise ConfigError(f"{masks}: is not a folder of masks")
    beside = pictures_of(masks)
    used = 0
    for folder in sorted(path for path in masks.iterdir() if path.is_dir()):
        names = _by_stem(folder)
        frames = _by_stem(beside / folder.name)
        both = sorted(names.keys() & frames.keys())[:SET_FRAMES]
        if len(both) < 2:
            continue
        used += 1
        shown = np.stack([_read(frames[stem], percept) for stem in both])
        marked = np.stack([_read_mask(names[stem], size) for stem in both])
        yield folder.name, Masked(shown, marked)
    if not used:
        raise ConfigError(f"{masks}: no video has two masks with frames of the same names in {beside}")


def _by_stem(folder: Path) -> dict[str, Path]:
    return {path.stem: path for path in folder.iterdir() if path.suffix.lower() in PICTURES} if folder.is_dir() else {}


def _read(path: Path, side: int) -> NDArray[np.uint8]:
    picture = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if picture is None:
        raise LocalmotionError(f"{path}: cannot be read as a picture")
    return np.asarray(cv2.resize(picture[..., ::-1], (side, side), interpolation=cv2.INTER_AREA), np.uint8)


def _read_mask(path: Path, side: int) -> NDArray[np.bool_]:
    """(side, side) pixels of which an object covers more than half."""
    picture = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if picture is None:
        raise LocalmotionError(f"{path}: cannot be read as a picture")
    marked = picture > 0 if picture.ndim == 2 else (picture[..., :3] > 0).any(-1)
    return np.asarray(cv2.resize(marked.astype(np.float32), (side, side), interpolation=cv2.INTER_AREA) > 0.5, np.bool_)
