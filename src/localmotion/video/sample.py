"""Windows of fixed length drawn from a clip store, as torch batches: an infinite stream whose position is one number.

A clip is drawn uniformly among those long enough, then a start uniformly among all valid ones, as in IPV's release
(thuml/ContextWM). Batch `index` is a pure function of `index`, `seed` and the store, so a resumed run gets the same
batches as an uninterrupted one.

The store keeps motion in its natural form (`flow[t]` from frame t to t+1); here it is shifted once to the
convention of `docs/decisions/0001`: position t of a batch has the motion that LED TO frame t.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from localmotion.errors import StoreError
from localmotion.video.bits import unpack
from localmotion.video.store import ClipStore

Batch = dict[str, torch.Tensor]
Split = Literal["train", "heldout", "all"]


def is_heldout(video: str, fraction: float) -> bool:
    """Whether the clips of a video belong to the held-out part: decided only by a hash of the video's id, so all clips of a
    video are in the same part, always."""
    digest = hashlib.blake2b(video.encode("utf-8", "surrogateescape"), digest_size=8, person=b"lm-heldout").digest()
    return int.from_bytes(digest, "big") / 2**64 < fraction


class NoClipsError(StoreError):
    """A part of a store, for training or held out, has no clips."""


def other_fraction(store: ClipStore, split: Split, fraction: float) -> float | None:
    """The held-out fraction next to ``fraction``, in tenths, with which both parts of the store have clips. None: there is none.

    ``split``: the part that has none now.
    """
    for tenth in range(1, 10) if split == "heldout" else range(9, 0, -1):
        share = tenth / 10
        held = {is_heldout(video, share) for video in store.videos}
        if (share > fraction if split == "heldout" else share < fraction) and len(held) == 2:
            return share
    return None


def spread(length: int, lead: int) -> int:
    """Starts before the first and after the last that are drawn in a piece of ``length`` positions and moved to these two.

    A method with a ``lead`` learns from the n = length - lead - 1 steps of a piece that have all frames before them. A step in the middle
    of an episode is in n pieces, an episode's first step in one. So that it is learned from as often, its piece is drawn n times as
    often, and so is the last one. Without a lead all starts are equally likely.
    """
    return max(length - lead - 2, 0) if lead else 0


class WindowSampler:
    """Infinite stream of batches of B windows of T frames (side S, N track slots).

    ======== =============== ======= ====================================================================
    image    (B, T, S, S, 3) uint8   frames, RGB 0..255
    flow     (B, T, S, S, 2) float16 motion from frame t-1 to t, pixels (x, y); zero at t = 0
    tracks   (B, T, N, 2)    float32 points (x, y) in frame t-1, pixels; at t = 0 those of frame 0
    visible  (B, T, N)       bool    the motion of this point is valid: visible in t-1, same track in t;
                                     False at t = 0
    track_id (B, T, N)       int32   track of each slot in frame t-1; at t = 0 that of frame 0
    is_first (B, T)          bool    True at t = 0
    clip     (B,)            int64   index of the clip in the store
    start    (B,)            int64   first frame of the window in the clip, below 0 where it begins with copies (`lead`)
    mask     (B, T, S, S)    bool    pixels of the agent, with `mask=True`
    ======== =============== ======= ====================================================================

    With `motion=False` the four keys of motion are left out and their files are not opened. Batches do not share
    memory. Use a sampler from one thread only.
    """

    def __init__(
        self,
        store: ClipStore,
        length: int,
        batch_size: int,
        seed: int,
        *,
        split: Split = "train",
        heldout_fraction: float = 0.1,
        prefetch: bool = True,
        motion: bool = True,
        mask: bool = False,
        rows: slice = slice(None),
        lead: int = 0,
    ) -> None:
        """`length` T and `batch_size` B; `seed` 0 or more. `rows`: those of each batch that are read; the batches hold no others.
        `lead`: windows may begin this many frames before a clip, where all frames are copies of its first (`Method.lead`). The first
        and the last window of a clip are then drawn more often (`spread`).

        Raises StoreError if no clip of the split has T frames, and with ``mask`` for a store without masks.
        """
        if not 0 <= lead < length or batch_size < 1 or seed < 0 or not 0 <= heldout_fraction < 1:
            raise ValueError(
                f"length {length}, lead {lead}, batch {batch_size}, seed {seed}, heldout {heldout_fraction}: out of range"
            )
        if split not in ("train", "heldout", "all"):
            raise ValueError(f"split {split!r} is none of train, heldout, all")
        self.store, self.length, self.batch_size, self.seed, self.rows = store, length, batch_size, seed, rows
        self.clips = _clips_of(store, length, split, heldout_fraction)
        """Indices in the store of the clips drawn from, (n,) int64."""
        self.lead = lead
        self.starts: NDArray[np.int64] = store.lengths[self.clips] + lead - length + 1 + 2 * spread(length, lead)
        """Number of starts of each of them that are drawn from, (n,) int64. With a lead some of them are one start."""
        self.index = 0
        """Index of the batch that `next` returns."""
        self._layout = layout(store, motion, mask)
        self._thread = ThreadPoolExecutor(1, "windows") if prefetch else None
        self._ahead: tuple[int, Future[Batch]] | None = None

    def positions(self, index: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Clips (B,) and starts (B,) of batch `index`.

        Uses raw Philox words with the seed as key and the index as counter, because their values are the same in all NumPy versions.
        """
        if index < 0:
            raise ValueError(f"batch index {index} is negative")
        words = np.random.Philox(key=self.seed, counter=[0, 0, 0, index]).random_raw(2 * self.batch_size)
        uniform = (words >> np.uint64(11)) * 2.0**-53  # (2 B,) in [0, 1)
        drawn = (uniform[: self.batch_size] * len(self.clips)).astype(np.int64)
        begin = (uniform[self.batch_size :] * self.starts[drawn]).astype(np.int64) - spread(self.length, self.lead)
        valid = self.store.lengths[self.clips[drawn]] + self.lead - self.length
        return self.clips[drawn], np.clip(begin, 0, valid) - self.lead

    def batch(self, index: int) -> Batch:
        """Batch `index` of the stream, independent of earlier calls."""
        clips, starts = self.positions(index)
        return self.windows(clips[self.rows], starts[self.rows])

    def windows(self, clips: NDArray[np.int64], starts: NDArray[np.int64]) -> Batch:
        """The batch of given windows: indices in the store and first frames, both (n,), any n."""
        T = self.length
        buffers: dict[str, NDArray[Any]] = {
            name: np.empty((len(clips), T, *shape), dtype) for name, (shape, dtype) in self._layout.items()
        }
        for b, (clip, start) in enumerate(zip(clips.tolist(), starts.tolist(), strict=True)):
            read_window(self.store, clip, start, {name: buffer[b] for name, buffer in buffers.items()})
        batch = {name: torch.from_numpy(buffer) for name, buffer in buffers.items()}
        first = torch.zeros(len(clips), T, dtype=torch.bool)
        first[:, 0] = True
        return batch | {"is_first": first, "clip": torch.from_numpy(clips), "start": torch.from_numpy(starts)}

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The next batch; with prefetch, the one after it is read in the background."""
        if self._thread is None:
            batch = self.batch(self.index)
        else:
            if self._ahead is None or self._ahead[0] != self.index:
                self._drop_ahead()
                self._ahead = (self.index, self._thread.submit(self.batch, self.index))
            future = self._ahead[1]
            self._ahead = None
            batch = future.result()
            self._ahead = (self.index + 1, self._thread.submit(self.batch, self.index + 1))
        self.index += 1
        return batch

    def state_dict(self) -> dict[str, int]:
        """Position in the stream: index of the next batch."""
        return {"index": self.index}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue at the position of `state`. The batches are the same if seed, length, batch size and store are."""
        if set(state) != {"index"} or int(state["index"]) < 0:
            raise ValueError(f"sampler state {state!r} is not {{'index': n}}")
        self.index = int(state["index"])

    def close(self) -> None:
        """Stop reading ahead."""
        self._drop_ahead()
        if self._thread is not None:
            self._thread.shutdown(wait=True)
            self._thread = None

    def _drop_ahead(self) -> None:
        if self._ahead is not None:
            self._ahead[1].cancel()
            self._ahead = None


def layout(store: ClipStore, motion: bool, mask: bool = False) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Per key of a batch, the shape and element type of one frame's entry.

    Raises StoreError with ``mask`` for a store without the array `mask`, (S, ceil(S/8)) bytes of bits.
    """
    size, tracks = store.size, store.tracks
    found: dict[str, tuple[tuple[int, ...], Any]] = {"image": ((size, size, 3), np.uint8)}
    if motion:
        found["flow"] = ((size, size, 2), np.float16)
        found |= {"tracks": ((tracks, 2), np.float32), "visible": ((tracks,), np.bool_), "track_id": ((tracks,), np.int32)}
    if mask:
        if store.extra.get("mask") != ("|u1", (size, -(-size // 8))):
            raise StoreError(f"{store.path}: has no masks of the agent; make it with --mask motion (extract, or collect --store)")
        found["mask"] = ((size, size), np.bool_)
    return found


def read_window(store: ClipStore, clip: int, start: int, into: Mapping[str, NDArray[Any]]) -> None:
    """Fill arrays (n, ...), by the keys of `layout`, with frames start to start + n of a clip and the motion that led to each.

    Motion stored at t leads to t+1, so it moves one position up; the first position has no motion. Masks stay where they are.
    With ``start`` below 0, and above -n, the first positions are copies of frame 0, without motion.
    """
    if start < 0:
        read_window(store, clip, 0, {name: array[-start:] for name, array in into.items()})
        for array in into.values():
            array[:-start] = array[-start]
        return
    stop = start + len(into["image"])
    into["image"][:] = store.window("frames", clip, start, stop)
    if "mask" in into:
        into["mask"][:] = unpack(store.window("mask", clip, start, stop), store.size)
    if "flow" not in into:
        return
    into["flow"][0] = 0
    into["flow"][1:] = store.window("flow", clip, start, stop - 1)
    tracks = store.window("tracks", clip, start, stop)
    into["tracks"][0], into["tracks"][1:] = tracks[0], tracks[:-1]
    ids = store.window("track_id", clip, start, stop)
    into["track_id"][0], into["track_id"][1:] = ids[0], ids[:-1]
    into["visible"][0] = False
    seen = store.window("visible", clip, start, stop)
    np.logical_and(seen[:-1], ids[1:] == ids[:-1], out=into["visible"][1:])


def _clips_of(store: ClipStore, length: int, split: Split, fraction: float) -> NDArray[np.int64]:
    """Indices of the clips of a split with at least `length` frames. Raises StoreError if there are none."""
    store.require_clips()
    held = np.asarray([is_heldout(video, fraction) for video in store.videos])
    chosen = np.ones_like(held) if split == "all" else held == (split == "heldout")
    if not chosen.any():
        raise NoClipsError(f"{store.path}: none of {len(store)} clips is in the {split} part; add clips")
    clips = np.flatnonzero(chosen & (store.lengths >= length))
    if not len(clips):
        part = "" if split == "all" else f" of the {split} part"
        longest = int(store.lengths[chosen].max())
        raise StoreError(
            f"{store.path}: no clip has {length} frames: the longest of {int(chosen.sum())} clips{part} has {longest}; "
            "use a shorter window or longer videos"
        )
    return clips.astype(np.int64)
