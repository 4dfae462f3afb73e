"""What probes are given: windows of a collection's clips, and the true motion in their frames (docs/studies.md)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from localmotion.errors import ConfigError
from localmotion.methods.base import Batch
from localmotion.video.sample import WindowSampler
from localmotion.video.store import ClipStore

Floats = NDArray[np.float32]
SKIP = 4  # first positions of a window to leave out: a code that uses past frames has too little history there
TARGETS = ("links", "velocities", "actions", "background", "colours", "pose")
LEAST_MOTION = 1e-3
"""Pixels per step. Components of the links' velocities with a smaller standard deviation are left out."""
FILES = ("velocities", "actions", "links", "exact_grid", "background", "colours")
PLACES = ("velocities", "links", "background")
"""Files whose row of the frame before is needed too."""
LEAST_CLIPS, LEAST_TESTED = 10, 2


@dataclass(frozen=True)
class Episodes:
    """Targets of a collection, one row for each frame. ``episode`` (n,) is the clip of each row."""

    name: str
    episode: NDArray[np.int64]
    targets: dict[str, Floats]
    """`velocities` (n, nv), `actions` (n, A), clipped to [-1, 1], `links` (n, up to 2L), `background` (n, 2) and `colours` (n, 3M), if
    the collection has them. `pose` (n, up to 4L) stands beside `colours`: the dimensions of the pose that vary."""
    before: Floats | None
    """Velocities one frame earlier, (n, nv)."""
    tested: NDArray[np.bool_]
    """(n,) rows of the test episodes: a fifth of all episodes, or those of a collection of their own."""
    pose: Floats | None = None
    """(n, 4L) pose of the links in the frame: all x, all y in pixels, then the cosines and the sines of their angles."""
    exact: Floats | None = None
    """(n, 128) exact flow that led to the frame, averaged on an 8x8 grid, in pixels."""
    perceived_exactly: bool = False
    """The clips' own flow is exact."""
    colours: tuple[str, ...] = ()
    """Names of the dimensions of the target `colours`: material and channel."""


class _Part(NamedTuple):
    """One collection: its windows, and the rows of its files in the frames after the first `SKIP` of each."""

    sampler: WindowSampler
    clips: NDArray[np.int64]
    """(windows,) clip of each window."""
    starts: NDArray[np.int64]
    """(windows,) its first frame."""
    episode: NDArray[np.int64]
    now: dict[str, Floats]
    before: dict[str, Floats]


class ProbeData:
    """Windows that cover a collection's clips, in batches, and the targets of their frames after the first `SKIP`.

    With ``test`` the probes are fitted on all episodes of ``path`` and scored on all episodes of ``test``.
    """

    def __init__(self, path: Path, length: int, batch_size: int = 16, *, mask: bool = False, test: Path | None = None) -> None:
        self.length, self.batch_size = length, batch_size
        self._parts = [_read(place, length, batch_size, mask) for place in (path, *([test] if test else []))]
        self.sampler, self.clips, self.starts = self._parts[0][:3]
        for place, part, least in zip((path, test), self._parts, (LEAST_CLIPS, LEAST_TESTED), strict=False):
            if (count := len(np.unique(part.clips))) < least:
                raise ConfigError(f"{place}: {count} clips are too few to split by episode; collect at least {least}")
        if test:
            _same_bodies(path, test, self._parts)
            ids = np.concatenate([self._parts[0].episode, self._parts[1].episode + len(self.sampler.store.ids)])
            tested = np.repeat([False, True], [len(part.episode) for part in self._parts])
        else:
            ids, chosen = self._parts[0].episode, np.unique(self.clips)
            held = np.random.default_rng(0).permutation(chosen)[: max(len(chosen) // 5, 2)]
            tested = np.isin(ids, held)
        joined = {kind: np.concatenate([part.now[kind] for part in self._parts]) for kind in self._parts[0].now}
        earlier = {kind: np.concatenate([part.before[kind] for part in self._parts]) for kind in self._parts[0].before}
        exact = joined.pop("exact_grid", None)
        pose = None
        if "links" in joined:
            joined["links"], pose = _moved(earlier["links"], joined["links"])
            if not joined["links"].shape[1]:
                del joined["links"]
        if "background" in joined:
            joined["background"] = joined["background"] - earlier["background"]
        if "colours" in joined:
            joined["colours"] = joined["colours"].reshape(len(ids), -1)  # (n, M, 3) -> (n, 3M)
            if pose is not None and (varies := pose.std(0) > LEAST_MOTION).any():
                joined["pose"] = pose[:, varies]
        if "actions" in joined:
            joined["actions"] = joined["actions"].clip(-1, 1)
        self.episodes = Episodes(
            f"{path.name}, tested on {test.name}" if test else path.name,
            ids,
            {kind: joined[kind] for kind in TARGETS if kind in joined},
            earlier.get("velocities"),
            tested,
            pose,
            None if exact is None else exact.reshape(len(ids), -1),
            all(part.sampler.store.recipe["flow"] == "exact" for part in self._parts),
            _channels(path) if "colours" in joined else (),
        )

    def batches(self) -> Iterator[Batch]:
        """All windows, in the order of the rows."""
        for part in self._parts:
            for at in range(0, len(part.clips), self.batch_size):
                yield part.sampler.windows(part.clips[at : at + self.batch_size], part.starts[at : at + self.batch_size])

    def code(self, of: Callable[[Batch], Tensor]) -> Floats:
        """Codes (n, d) of all frames after the first `SKIP` of a window.

        ``of`` returns the codes (B, T, d) of a batch.
        """
        found = [of(batch)[:, SKIP:].float().cpu().flatten(0, 1).numpy() for batch in self.batches()]  # (B (T - SKIP), d) each
        return np.concatenate(found)


def _read(path: Path, length: int, batch_size: int, mask: bool) -> _Part:
    """Windows and files of a collection. Raises ConfigError if it has no targets, or not for all clips."""
    store = ClipStore(path)
    sampler = WindowSampler(store, length, batch_size, 0, split="all", prefetch=False, mask=mask)
    places = [(int(c), s) for c in sampler.clips for s in range(0, int(store.lengths[c]) - length + 1, length - SKIP)]
    clips, starts = (np.array(x, np.int64) for x in zip(*places, strict=True))
    found: dict[str, list[Floats]] = {}
    before: dict[str, list[Floats]] = {}
    episode = []
    for clip, start in places:
        first, stop = start + SKIP, start + length
        episode.append(np.full(length - SKIP, clip))
        for kind in FILES:
            array = _load(path / kind / f"{store.ids[clip]}.npy", int(store.lengths[clip]))
            if array is None:
                continue
            found.setdefault(kind, []).append(array[first:stop].astype(np.float32))
            if kind in PLACES:
                before.setdefault(kind, []).append(array[first - 1 : stop - 1].astype(np.float32))
    if found.keys().isdisjoint(TARGETS):
        raise ConfigError(f"{path}: no actions/ and velocities/ beside the clips; make it with localmotion collect --store")
    if any(len(x) != len(places) for x in found.values()):
        raise ConfigError(f"{path}: some clips lack their actions, velocities or links; collect it again")
    now = {kind: np.concatenate(x) for kind, x in found.items()}
    return _Part(sampler, clips, starts, np.concatenate(episode), now, {kind: np.concatenate(x) for kind, x in before.items()})


def _channels(path: Path) -> tuple[str, ...]:
    """Names of the channels of a collection's materials, 3M. Raises ConfigError if they cannot be read."""
    file = path / "collection.json"
    try:
        materials = json.loads(file.read_text())["colours"]["names"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file}: has no names of materials ({error}); collect it again") from error
    return tuple(f"{material} {channel}" for material in materials for channel in ("red", "green", "blue"))


def _same_bodies(path: Path, test: Path, parts: list[_Part]) -> None:
    """Raise ConfigError unless both collections have the same files with rows of the same shape, and pictures of one size."""
    shapes = [{kind: x.shape[1:] for kind, x in part.now.items()} for part in parts]
    if differ := sorted(kind for kind in shapes[0].keys() | shapes[1].keys() if shapes[0].get(kind) != shapes[1].get(kind)):
        raise ConfigError(f"{test}: {', '.join(differ)} differ from those of {path}; collect both in the same task")
    if parts[0].sampler.store.size != parts[1].sampler.store.size:
        raise ConfigError(f"{test}: pictures have another size than those of {path}; collect both with the same recipe")


def _load(file: Path, frames: int) -> NDArray[Any] | None:
    """Array with one row for each of a clip's frames, or None if there is no file."""
    if not file.exists():
        return None
    try:
        found: NDArray[Any] = np.load(file, mmap_mode="r", allow_pickle=False)  # mmap fails if the header claims too much
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"{file}: cannot be read ({error}); collect it again") from error
    if len(found) != frames:
        raise ConfigError(f"{file}: has {len(found)} rows for a clip of {frames} frames; collect it again")
    return found


def _moved(before: Floats, now: Floats) -> tuple[Floats, Floats]:
    """Velocities (n, up to 2L) and poses (n, 4L) of links with places (n, L, 3) one frame earlier and now.

    Links that are behind the camera in any frame are left out. Their places are not finite.
    """
    seen = np.isfinite(before).all((0, 2)) & np.isfinite(now).all((0, 2))
    before, now = before[:, seen], now[:, seen]
    moved = np.concatenate([now[..., 0] - before[..., 0], now[..., 1] - before[..., 1]], 1)
    pose = np.concatenate([now[..., 0], now[..., 1], np.cos(now[..., 2]), np.sin(now[..., 2])], 1)
    return moved[:, moved.std(0) > LEAST_MOTION], pose
