"""Moving backgrounds: clips from a folder of videos, or procedural ones, played forwards and backwards, or shifted by actions.

Sources: the Distracting Control Suite (Stone et al. 2021), whose clips are DAVIS 2017; "action-correlated noise" as in
MaskLAM (arXiv 2602.02259). The abstract does not define it; docs/environments.md has the generators used here.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from localmotion.envs.visuals import in_range
from localmotion.errors import ConfigError, unknown_name

if TYPE_CHECKING:
    from localmotion.video import VideoRef

VARIABLE = "LOCALMOTION_BACKGROUNDS"
"""Environment variable with the folder of videos, used if none is given."""
SPLITS = ("train", "val", "all")
PROCEDURAL = {"train": 60, "val": 30}
"""Number of procedural clips of each split, as many as DAVIS 2017 has videos."""
FRAMES = 80
"""Frames of a procedural clip."""
MAX_FRAMES = 200
"""Maximum number of frames of a video; the first ones are used."""
CACHE_BYTES = 2**29
"""Memory for clips in one process, bytes: 130 clips of 80 frames at 128 pixels. Beyond it the least recently used clips are dropped."""
GRATINGS = 6
MOTIONS = ("video", "independent", "lagged", "twin", "leaky")
_STREAM = 0xBAC


class Backgrounds(Protocol):
    """Numbered clips."""

    def count(self) -> int:
        """How many clips."""

    def clip(self, index: int) -> NDArray[np.uint8]:
        """(T, S, S, 3) uint8. Must not be modified."""

    def describe(self) -> dict[str, Any]:
        """Their source, JSON-able."""


def find_backgrounds(videos: str | Path | None, *, split: str, limit: int | None, side: int) -> Backgrounds:
    """Clips of the folder ``videos``, or of the folder in the environment variable, or procedural ones ("procedural" or neither given).

    Args:
        videos: any folder of videos (all formats of `localmotion.video`, frame folders too). Subfolders ``train`` and ``val`` are the
            split if they exist; else every third video in order of names is held out as ``val``.
        split: "train", "val" or "all".
        limit: use only the first so many of the split; None: all.
        side: S of the clips in pixels.

    Raises:
        ConfigError: an unknown split, a folder that does not exist, or a split without videos.
    """
    if split not in SPLITS:
        raise unknown_name("split of the background videos", split, SPLITS)
    if limit is not None:
        limit = int(in_range("num_videos", limit, 1, 10**6, whole=True))
    given = videos if videos is not None else os.environ.get(VARIABLE) or None
    if given in (None, "procedural"):
        return ProceduralBackgrounds(split, limit, side)
    return VideoBackgrounds(Path(str(given)), split, limit, side)


class ProceduralBackgrounds:
    """Sums of six drifting sinusoidal gratings in random colours. A clip depends only on its number; 0..59 are train, 60..89 val."""

    def __init__(self, split: str, limit: int | None, side: int) -> None:
        train, val = PROCEDURAL["train"], PROCEDURAL["val"]
        numbers = {"train": range(train), "val": range(train, train + val), "all": range(train + val)}[split]
        self._numbers, self._side, self._split = numbers[:limit], side, split

    def count(self) -> int:
        """How many clips."""
        return len(self._numbers)

    def clip(self, index: int) -> NDArray[np.uint8]:
        """(80, S, S, 3) uint8 that tile at their edges."""
        number = self._numbers[index]
        return _CLIPS.get((number, self._side), lambda: _gratings(number, self._side))

    def describe(self) -> dict[str, Any]:
        """Source, split and number."""
        return {"source": "procedural", "split": self._split, "clips": self.count(), "side": self._side}


class VideoBackgrounds:
    """Videos of a folder, decoded on first use and kept in memory at their drawn size."""

    def __init__(self, folder: Path, split: str, limit: int | None, side: int) -> None:
        from localmotion.video.listing import usable_videos

        if not folder.is_dir():
            raise ConfigError(f"background videos: {folder} is not a folder; give a folder of videos, or leave it out")
        parts = {name: folder / name for name in ("train", "val") if (folder / name).is_dir()}
        if len(parts) == 2:
            where = [parts[split]] if split != "all" else [parts["train"], parts["val"]]
            found = [ref for part in where for ref in usable_videos(part)]
        else:
            everything = usable_videos(folder)
            held_out = {"train": (0, 1), "val": (2,), "all": (0, 1, 2)}[split]
            found = [ref for number, ref in enumerate(everything) if number % 3 in held_out]
        self._videos = found[:limit]
        self._folder, self._split, self._side = folder, split, side
        if not self._videos:
            raise ConfigError(f"background videos: {folder} has no videos for split {split}; choose another split or add videos")

    def count(self) -> int:
        """How many clips."""
        return len(self._videos)

    def clip(self, index: int) -> NDArray[np.uint8]:
        """(T, S, S, 3) uint8, T up to `MAX_FRAMES`. Raises VideoError for a file that cannot be read."""
        ref = self._videos[index]
        return _CLIPS.get((ref, self._side), lambda: _decoded(ref, self._side))

    def describe(self) -> dict[str, Any]:
        """Source, split, number and a hash of the list of names."""
        names = "\n".join(str(ref.path.relative_to(self._folder)) for ref in self._videos)
        digest = hashlib.sha256(names.encode()).hexdigest()[:16]
        return {"source": "folder", "split": self._split, "clips": self.count(), "list": digest, "side": self._side}


class ClipCache:
    """Clips of this process. Beyond ``limit`` bytes the least recently used ones are dropped."""

    def __init__(self, limit: int) -> None:
        self._limit, self._clips = limit, dict[tuple[Hashable, int], NDArray[np.uint8]]()

    def get(self, key: tuple[Hashable, int], make: Callable[[], NDArray[np.uint8]]) -> NDArray[np.uint8]:
        """The clip of ``key``, made if missing. The newest is kept even if it alone exceeds the limit."""
        clip = self._clips.pop(key, None)
        if clip is None:
            clip = make()
            clip.flags.writeable = False
        self._clips[key] = clip  # at the end: used last
        while len(self._clips) > 1 and sum(kept.nbytes for kept in self._clips.values()) > self._limit:
            del self._clips[next(iter(self._clips))]
        return clip


_CLIPS = ClipCache(CACHE_BYTES)


def _decoded(ref: VideoRef, side: int) -> NDArray[np.uint8]:
    from localmotion.video import decode

    return decode(ref, side, max_frames=MAX_FRAMES)


def _gratings(number: int, side: int) -> NDArray[np.uint8]:
    rng = np.random.default_rng([_STREAM, number])
    waves = rng.integers(1, 5, (GRATINGS, 2)) * rng.choice([-1, 1], (GRATINGS, 2))  # whole numbers: the picture tiles
    drift = rng.uniform(0.1, 0.5, GRATINGS) * rng.choice(
        [-1, 1], GRATINGS
    )  # radians a frame: a grating passes in 12 to 60 frames
    colours = rng.standard_normal((GRATINGS, 3)) + rng.standard_normal((GRATINGS, 1))
    colours *= 0.5 / np.sqrt((colours**2).sum(axis=0) / 2) * rng.uniform(0.25, 0.5)
    middle = rng.uniform(0.3, 0.7, 3)
    grid = 2j * np.pi * np.arange(side) / side
    space = np.exp(waves[:, :1] * grid)[:, :, None] * np.exp(waves[:, 1:] * grid)[:, None, :]
    time = np.exp(1j * (drift * np.arange(FRAMES)[:, None] + rng.uniform(0, 2 * np.pi, GRATINGS)))
    weights = (time[:, None, :] * colours.T[None]).reshape(-1, GRATINGS)
    field = (weights @ space.reshape(GRATINGS, -1)).real.reshape(FRAMES, 3, side, side)
    frames = np.clip(middle[:, None, None] + field, 0, 1) * 255
    return np.ascontiguousarray(frames.transpose(0, 2, 3, 1)).round().astype(np.uint8)


class Playback:
    """Selects the shown frame: random clip, start and direction; the frame number changes by one and reverses at the ends.

    Args:
        backgrounds: the clips.
        rng: draws clip, start and direction, in this order.
        dynamic: False: the start frame stays.
    """

    def __init__(self, backgrounds: Backgrounds, rng: np.random.Generator, *, dynamic: bool = True) -> None:
        self.number = int(rng.integers(backgrounds.count()))
        self._clip = backgrounds.clip(self.number)
        self.index = int(rng.integers(len(self._clip)))
        self._direction = 1 if rng.random() < 0.5 else -1
        self._dynamic = dynamic

    def advance(self) -> None:
        """Advance by one env step."""
        if not self._dynamic:
            return
        last = len(self._clip) - 1
        self.index += self._direction
        if self.index <= 0:
            self.index, self._direction = 0, 1
        elif self.index >= last:
            self.index, self._direction = last, -1

    def frame(self) -> NDArray[np.uint8]:
        """The current frame, (S, S, 3) uint8."""
        return np.asarray(self._clip[self.index])


class ActionShift:
    """The 2-d shift of a background that follows actions: ``u' = rho u + s (c W f(a) + sqrt(1 - c^2) noise)`` (docs/environments.md).

    ``a`` is the present action (leaky), the action of ``lag`` env steps ago (lagged), the action of another episode (twin), or is not used
    (independent, c = 0). ``f`` is tanh of the action divided by the standard deviation of a uniform one. ``W`` (2, A) has rows of length
    one and depends only on A and the rank.

    Args:
        motion: "independent", "lagged", "twin" or "leaky".
        correlation: c in 0..1.
        lag: env steps of the lagged source.
        rank: of W, 1 or 2; with 1 both axes follow the same mixture of actions.
        dims: A.
        rng: of the episode; draws noise, and the start in ``twin``.
        twin: (N, A) actions of another episode, repeated in a circle.
        speed: s in pixels of the picture; rho is 0.9.
    """

    RHO = 0.9

    def __init__(
        self,
        motion: str,
        *,
        correlation: float,
        lag: int,
        rank: int,
        dims: int,
        rng: np.random.Generator,
        twin: NDArray[np.float64] | None,
        speed: float,
    ) -> None:
        self._rng, self._speed, self._motion = rng, speed, motion
        self._correlation = 0.0 if motion == "independent" else correlation
        self._weights = mixing(dims, rank)
        self._past = [np.zeros(dims)] * lag
        self._twin, self._clock = twin, 0 if twin is None else int(rng.integers(len(twin)))
        self.offset = np.zeros(2)

    def advance(self, action: NDArray[np.float64]) -> None:
        """One env step with ``action`` (A,) in [-1, 1]."""
        if self._motion == "lagged":
            self._past.append(action.copy())
            action = self._past.pop(0)
        elif self._motion == "twin" and self._twin is not None:
            action = self._twin[self._clock % len(self._twin)]
            self._clock += 1
        pull = self._weights @ np.tanh(np.sqrt(3.0) * action)
        noise = self._rng.standard_normal(2)
        c = self._correlation
        self.offset = self.RHO * self.offset + self._speed * (c * pull + np.sqrt(1 - c * c) * noise)


def mixing(dims: int, rank: int) -> NDArray[np.float64]:
    """The fixed W (2, A) of `ActionShift`, rows of length one."""
    weights = np.random.default_rng([_STREAM, dims]).standard_normal((2, dims))
    if rank == 1:
        weights[1] = weights[0]
    return np.asarray(weights / np.linalg.norm(weights, axis=1, keepdims=True))


def shifted(texture: NDArray[np.uint8], offset: NDArray[np.float64]) -> NDArray[np.uint8]:
    """A picture (S, S, 3) moved by ``offset`` (x, y) in pixels, wrapped around its edges, bilinear."""
    side = texture.shape[0]
    whole = np.floor(offset).astype(np.int64)
    fx, fy = (offset - whole).tolist()
    moved = np.roll(texture, (int(whole[1]) % side, int(whole[0]) % side), axis=(0, 1))
    if fx:
        moved = cv2.addWeighted(moved, 1 - fx, np.roll(moved, 1, axis=1), fx, 0)
    if fy:
        moved = cv2.addWeighted(moved, 1 - fy, np.roll(moved, 1, axis=0), fy, 0)
    return np.asarray(moved, np.uint8)
