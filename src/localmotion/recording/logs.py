"""Sequences of logged episodes, with actions and rewards, from a clip store. Offline stages learn from them.

`collect --store` writes such a store. Its further arrays (`logged`) hold what led to each frame, as in a replay
(docs/decisions/0001): row t has the action and the reward of the agent step from frame t-1 to t. Row 0 is zero.
"""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from localmotion.errors import StoreError
from localmotion.video.bits import mask_layout
from localmotion.video.sample import is_heldout, layout, read_window, spread
from localmotion.video.shards import Extra
from localmotion.video.store import ClipStore

REQUIRED = {"action": "<f4", "reward": "<f4", "is_terminal": "|u1"}


def logged(action_dim: int, mask_size: int = 0) -> Extra:
    """The arrays that a store of logged episodes has in addition to those of a clip store.

    =============== ================== =============================================================================
    action          (A,) float32       action that led to the frame, in [-1, 1]; zeros in the first row
    reward          () float32         reward of that agent step; zero in the first row
    is_terminal     () uint8           1 where the episode ended there by the task's rules, not by a time limit
    mask            (S, ceil(S/8))     uint8, bits of the agent's pixels, first column in the highest bit (`numpy.packbits`);
                                       with ``mask_size`` S, for environments that know the mask and recipes with a mask backend
    =============== ================== =============================================================================
    """
    found: dict[str, tuple[str, tuple[int, ...]]] = {
        "action": ("<f4", (action_dim,)),
        "reward": ("<f4", ()),
        "is_terminal": ("|u1", ()),
    }
    return {**found, **(mask_layout(mask_size) if mask_size else {})}


class _Piece(NamedTuple):
    """Frames of one episode in a sequence: position in the sequence, clip, first frame, and number of frames."""

    at: int
    clip: int
    start: int
    length: int


class EpisodeSampler:
    """Batches of B sequences of T positions from logged episodes. Keys and conventions are those of a replay's batches, but for copies
    before an episode (``lead``).

    The sampler draws an episode uniformly, then a window of it. If the episode is shorter than T, further episodes
    follow, each from its ``is_first`` on (docs/decisions/0011). Batch ``index`` is a pure function of ``index``,
    ``seed`` and the store, so a resumed run gets the batches of an uninterrupted one.

        image (B,T,S,S,3) uint8   action (B,T,A) float32   reward (B,T) float32   is_terminal, is_first (B,T) bool
        flow, tracks, visible, track_id as in `video.sample.WindowSampler`, if ``motion``
        mask (B,T,S,S) bool, if ``mask``
        goal (B,T,S,S,3) uint8, if ``goal``: the last stored picture of the episode. Long episodes of a data set are several clips; the
            goal of each is the last picture of the last one

    Args:
        store: a store of `collect --store`, or any other store with the arrays of `logged`.
        length, batch_size: T and B.
        seed: of the sampling, 0 or more.
        motion, mask, goal: whether batches have these keys.
        prioritize_ends: draw ends of episodes more often, as `Replay` does.
        labels: number of labelled transitions; 0: all. The sampler then draws from these only (`label_set`).
        label_seed: of the choice of the labelled transitions.
        rows: those of each batch that are read; the batches hold no others.
        lead: an episode may begin with up to this many copies of its first frame, without action, reward and motion (`Method.lead`). Its
            first and last pieces are then drawn more often (`video.sample.spread`).
        heldout_fraction: share of the videos that is left out, chosen by a hash of their id.

    Raises StoreError for a store without actions, rewards or (with ``mask``) masks, for a store without any episode
    of two frames, and for a store with fewer transitions than ``labels``.
    """

    def __init__(
        self,
        store: ClipStore,
        length: int,
        batch_size: int,
        seed: int,
        *,
        motion: bool = False,
        mask: bool = False,
        goal: bool = False,
        prioritize_ends: bool = False,
        heldout_fraction: float = 0.0,
        labels: int = 0,
        label_seed: int = 0,
        rows: slice = slice(None),
        lead: int = 0,
    ) -> None:
        if not 0 <= lead < length or batch_size < 1 or seed < 0 or not 0 <= heldout_fraction < 1:
            raise ValueError(
                f"length {length}, lead {lead}, batch {batch_size}, seed {seed}, heldout {heldout_fraction}: out of range"
            )
        self.lead = lead
        self.store, self.length, self.batch_size, self.seed, self.rows = store, length, batch_size, seed, rows
        self.prioritize_ends = prioritize_ends
        self.action_dim = action_dim(store)
        self._motion = layout(store, motion, mask)
        self._last = {video: clip for clip, video in enumerate(store.videos)} if goal else {}  # clips of a video are in order
        store.require_clips()
        kept = np.array([not is_heldout(video, heldout_fraction) for video in store.videos])
        self.clips = np.flatnonzero(kept & (store.lengths >= 2))
        """Store indices of the episodes that the sampler draws from, (n,) int64."""
        if not len(self.clips):
            raise StoreError(f"{store.path}: no episode of two frames or more to learn from")
        self.frames: NDArray[np.int64] = store.lengths[self.clips].copy()
        """Number of frames of each of them that the sampler draws from, (n,) int64: all, or those with labels."""
        if labels:
            self._keep_labelled(labels, label_seed)

    def _keep_labelled(self, labels: int, seed: int) -> None:
        frames = dict(label_set(self.store, labels, seed, self.clips))
        kept = np.array([clip in frames for clip in self.clips.tolist()])
        self.clips = self.clips[kept]
        self.frames = np.array([frames[clip] for clip in self.clips.tolist()], np.int64)

    def batch(self, index: int) -> dict[str, torch.Tensor]:
        """Batch ``index`` of the stream, independent of earlier calls."""
        rng = np.random.Generator(np.random.Philox(key=self.seed, counter=[0, 0, 1, index]))
        drawn = [self._pieces(rng) for _ in range(self.batch_size)][self.rows]
        shape = (len(drawn), self.length)
        plain: dict[str, NDArray[Any]] = {
            "action": np.zeros((*shape, self.action_dim), np.float32),
            "reward": np.zeros(shape, np.float32),
            "is_terminal": np.zeros(shape, np.bool_),
            "is_first": np.zeros(shape, np.bool_),
        }
        seen = {name: np.empty((*shape, *entry), dtype) for name, (entry, dtype) in self._motion.items()}
        goals = {"goal": np.empty_like(seen["image"])} if self._last else {}
        for row, pieces in enumerate(drawn):
            for piece in pieces:
                part = (row, slice(piece.at, piece.at + piece.length))
                read_window(self.store, piece.clip, piece.start, {name: array[part] for name, array in seen.items()})
                self._read(piece, {name: array[part] for name, array in plain.items()})
                for array in goals.values():
                    last = self._last[self.store.videos[piece.clip]]
                    array[part] = self.store.window("frames", last, int(self.store.lengths[last]) - 1)
        return {name: torch.from_numpy(array) for name, array in (seen | plain | goals).items()}

    def _pieces(self, rng: np.random.Generator) -> list[_Piece]:
        """The pieces of a sequence: one window, or several short episodes in a row."""
        found: list[_Piece] = []
        at = 0
        while at < self.length:
            drawn = rng.integers(len(self.clips))
            clip, frames = int(self.clips[drawn]), int(self.frames[drawn])
            length = min(self.length - at, frames + self.lead)
            spare, more = frames + self.lead - length, spread(length, self.lead)
            start = int(rng.integers(-more, spare + max(length if self.prioritize_ends else 0, more) + 1))
            begin = min(max(start, 0), spare) - self.lead
            found.append(_Piece(at, clip, max(begin, 1 - length), length))  # a piece holds its first true frame
            at += length
        return found

    def _read(self, piece: _Piece, into: dict[str, NDArray[Any]]) -> None:
        _, clip, start, length = piece
        window = {name: self.store.window(name, clip, max(start, 0), start + length) for name in REQUIRED}
        own = slice(max(-start, 0), None)  # without copies
        into["reward"][own] = window["reward"]
        into["is_terminal"][own] = window["is_terminal"] != 0
        into["action"][own][1:] = window["action"][1:]  # the action that led to the first frame is unknown, as at a reset
        into["is_first"][0] = True


def label_set(store: ClipStore, labels: int, seed: int, clips: NDArray[np.int64] | None = None) -> list[tuple[int, int]]:
    """The labelled transitions of a budget: pairs of a clip's index and the number of its first frames that they span.

    Episodes are put in an order that depends on their ids and ``seed`` only. The first ``labels`` transitions in this order
    are labelled, so the set of a larger budget contains that of a smaller one. n frames span n - 1 transitions.

    Args:
        clips: indices of the episodes to choose from; default: all.

    Raises StoreError if there are fewer than ``labels`` transitions.
    """
    chosen = range(len(store)) if clips is None else clips.tolist()

    def place(clip: int) -> bytes:
        text = f"{seed} {store.ids[clip]}".encode("utf-8", "surrogateescape")
        return hashlib.blake2b(text, digest_size=16, person=b"lm-labels").digest()

    found, left = [], labels
    for clip in sorted(chosen, key=place):
        count = min(left, int(store.lengths[clip]) - 1)
        if count > 0:
            found.append((clip, count + 1))
            left -= count
    if left > 0:
        raise StoreError(f"{store.path}: labels={labels}, but it has {labels - left} transitions; lower labels, or 0 for all")
    return found


def action_dim(store: ClipStore) -> int:
    """Number A of action dimensions of a store of logged episodes.

    Raises StoreError if actions or rewards are missing.
    """
    if lacking := [name for name, dtype in REQUIRED.items() if store.extra.get(name, ("", ()))[0] != dtype]:
        raise StoreError(
            f"{store.path}: has no {', '.join(lacking)} for each frame, so it is no store of logged episodes; "
            "make one with localmotion collect ENV --out DIR --store"
        )
    return int(store.extra["action"][1][0])
