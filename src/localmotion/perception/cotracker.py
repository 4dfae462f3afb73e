"""CoTracker3 point tracks through torch.hub: the tracker of DRP, section 4.2.1. Opt-in, because it is non-commercial.

Karaev et al., "CoTracker3: Simpler and Better Point Tracking by Pseudo-Labelling Real Videos", 2024. Code and weights are
CC-BY-NC-4.0; no part of them is in this package.

Streaming. CoTracker's own online mode returns results only every 8 frames, needs chunks of 16 frames and fixes its points in the
first frame. So it cannot give a position for each new frame or accept redrawn points. Instead, ``step`` keeps the newest ``window``
frames of the stream and runs the clip model on them, for the newest frame only. The query of each point is the first frame of the
window in which it was visible, not the previous frame. So errors accumulate once per window, not once per frame.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.overrides import TorchFunctionMode

from localmotion.errors import LocalmotionError
from localmotion.perception._neural import (
    check_frames,
    check_options,
    failure,
    inference,
    pick_device,
    pick_precision,
    read_state_dict,
    shared_network,
)
from localmotion.perception.base import Frame, Points, register

REPOSITORY = "facebookresearch/co-tracker:82e02e8029753ad4ef13cf06be7f4fc5facdda4d"
"""The commit this backend was checked with; torch.hub runs its code, so it is pinned."""
WEIGHTS_URL = "https://huggingface.co/facebook/cotracker3/resolve/main/scaled_offline.pth"
SAME_POINT = 1e-2
"""Distance in pixels below which an input point equals a returned one (callers scale points up and down in float32)."""


CODE = {"source": "github", "repository": REPOSITORY}
"""Options that select the code to run. Files may not change them (`perception.trust.check_recipe`)."""


class LicenceWarning(UserWarning):
    """A backend whose licence forbids some uses is being loaded."""


_warned: set[str] = set()


def _warn_licence(accepted: bool) -> None:
    if accepted or CoTracker3.licence in _warned:
        return
    warnings.warn(
        "cotracker3: code and weights are CC-BY-NC-4.0, no commercial use; accept_licence=True hides this warning, "
        "track=lk has no such limit",
        LicenceWarning,
        stacklevel=3,
    )
    _warned.add(CoTracker3.licence)


@dataclass
class _Stream:
    """The newest frames of one stream and the positions of its points in them (L frames, N points)."""

    frames: list[Frame]
    xy: NDArray[np.float32]  # (L, N, 2)
    seen: NDArray[np.bool_]  # (L, N) the point existed and was visible


@register("track", "cotracker3")
class CoTracker3:
    """CoTracker3, offline model. ``track`` uses the whole clip (not causal); ``step`` uses only the past.

    Options:
        accept_licence: True confirms the CC-BY-NC-4.0 licence and turns the LicenceWarning off.
        source: ``github`` (torch.hub downloads `repository` once into its cache) or ``local`` (`repository` is a folder).
        repository: ``owner/name:ref`` or the path of a checkout; by default the commit this was checked with.
        weights: ``official`` (downloaded by torch.hub into its cache), the path of a local .pth or .safetensors file, or
            ``random``: untrained, only for tests. Only tensors are read (``weights_only``).
        sha256: SHA-256 (or its first digits) that a local weight file must have; empty: no check.
        window: frames kept by ``step``, including the newest. The cost grows with it.
        max_frames: longest piece of a clip tracked at once (60 is the training length); longer clips are tracked piece by
            piece with half overlap.
        batch: pieces in one forward pass, if several clips of one length are tracked (`tracks`).
        streams: streams (environments) that one backend can track at the same time.
        device, precision: as in SeaRaft.

    Raises LocalmotionError if code or weights are not available, ConfigError for an invalid option.
    """

    name: ClassVar[str] = "cotracker3"
    licence: ClassVar[str] = "CC-BY-NC-4.0"
    causal: ClassVar[bool] = False

    def __init__(
        self,
        *,
        accept_licence: bool = False,
        source: str = "github",
        repository: str = REPOSITORY,
        weights: str = "official",
        sha256: str = "",
        window: int = 16,
        max_frames: int = 60,
        batch: int = 4,
        streams: int = 64,
        device: str = "auto",
        precision: str = "float32",
    ) -> None:
        check_options(
            self.name,
            source=source in ("github", "local"),
            window=2 <= window <= max_frames,
            max_frames=max_frames >= 2,
            batch=batch >= 1,
            streams=streams >= 1,
        )
        self.window, self.max_frames, self.batch, self.max_streams = window, max_frames, batch, streams
        self.device = pick_device(device)
        self.dtype = pick_precision(self.name, precision, self.device)
        _warn_licence(accept_licence)
        self._predictor = shared_network(
            (self.name, source, repository, weights, sha256),
            self.device,
            lambda: self._load(source, repository, weights, sha256),
        )
        self._streams: list[_Stream] = []  # most recently used last

    def _load(self, source: str, repository: str, weights: str, sha256: str) -> Any:
        if source == "local" and not (Path(repository) / "hubconf.py").is_file():
            raise LocalmotionError(
                f"cotracker3: {repository} has no hubconf.py; give the folder of a co-tracker checkout as repository"
            )
        try:
            # pretrained=False: the repository's own loading would unpickle its download.
            predictor = torch.hub.load(
                repository,
                "cotracker3_offline",
                source=source,
                trust_repo=True,
                skip_validation=True,
                verbose=False,
                pretrained=False,
            )
        except Exception as error:  # third-party code: network, zip and import errors of any type
            fix = "check the network, or clone facebookresearch/co-tracker and use source=local, repository=FOLDER"
            raise failure(self.name, f"loading the code from {repository}", error, fix) from error
        if weights == "random":
            return predictor
        if weights == "official":
            try:
                state = torch.hub.load_state_dict_from_url(WEIGHTS_URL, map_location="cpu", weights_only=True)
            except Exception as error:  # URL, zip and pickle errors, each of its own type
                fix = f"download {WEIGHTS_URL} elsewhere and give its path as weights"
                raise failure(self.name, "fetching the weights", error, fix) from error
        else:
            state = read_state_dict(self.name, Path(weights), sha256)
        try:
            predictor.model.load_state_dict(state)
        except RuntimeError as error:
            fix = "use the file scaled_offline.pth of CoTracker3"
            raise failure(self.name, f"fitting weights {weights!r} to the model", error, fix) from error
        return predictor

    def track(self, frames: NDArray[np.uint8], points: Points, start: int = 0) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Follow (N, 2) ``points`` of frame ``start`` through (T, H, W, 3): (T, N, 2) pixels and (T, N) visibility.

        Positions before ``start`` equal the starting points and are invisible, as are positions outside the frame.
        """
        check_frames(frames, "frames")
        points = _check_points(points)
        total, count = len(frames), len(points)
        if not 0 <= start < total:
            raise ValueError(f"start {start} is outside the {total} frames")
        xy = np.repeat(points[None], total, axis=0)
        seen = np.zeros((total, count), np.bool_)
        seen[start] = _inside(points, frames)
        begin = done = start
        while done < total - 1 and count:
            end = min(begin + self.max_frames, total)
            anchor = begin + _anchors(seen[begin : done + 1])
            found, visible = self._run(frames[begin:end], anchor - begin, xy[anchor, np.arange(count)])
            xy[done + 1 : end] = found[done + 1 - begin :]
            seen[done + 1 : end] = visible[done + 1 - begin :]
            done, begin = end - 1, max(start, end - max(1, self.max_frames // 2))
        return xy, seen

    def tracks(self, asked: Sequence[tuple[NDArray[np.uint8], Points]]) -> list[tuple[NDArray[np.float32], NDArray[np.bool_]]]:
        """`track` of each, from its first frame; ``batch`` clips with the same numbers of frames and points in one forward pass.

        Clips of other numbers are not padded, because points attend to each other: added points would change the others.
        """
        alike: dict[tuple[int, ...], list[int]] = {}
        for index, (frames, points) in enumerate(asked):
            check_frames(frames, "frames")
            if len(points) and 1 < len(frames) <= self.max_frames:
                alike.setdefault((*frames.shape, len(_check_points(points))), []).append(index)
        found: dict[int, tuple[NDArray[np.float32], NDArray[np.bool_]]] = {}
        for indices in alike.values():
            for start in range(0, len(indices), self.batch):
                part = indices[start : start + self.batch]
                clips = np.stack([asked[i][0] for i in part])
                points = np.stack([asked[i][1] for i in part]).astype(np.float32)
                xy, seen = self._run_many(clips, np.zeros(points.shape[:2], np.intp), points)
                for i, row_xy, row_seen in zip(part, xy, seen, strict=True):
                    row_seen[0] = _inside(asked[i][1], asked[i][0])
                    row_xy[0] = asked[i][1]
                    found[i] = row_xy, row_seen
        return [found[i] if i in found else self.track(*clip) for i, clip in enumerate(asked)]

    def step(self, previous: Frame, current: Frame, points: Points) -> tuple[Points, NDArray[np.bool_]]:
        """Advance (N, 2) points from ``previous`` to ``current``: new (N, 2) positions and (N,) visibility.

        A stream is identified by its newest frame. If ``previous`` is the ``current`` of an earlier call and at least one point
        equals one returned then, the kept frames are used; otherwise a new stream begins. So resets need no call, points may
        be redrawn at any time and in any slot, and one backend can serve several environments.
        """
        points = _check_points(points)
        check_frames(np.asarray(current)[None], "current frame")
        if not len(points):
            return points, np.zeros(0, np.bool_)
        stream = self._stream_of(previous, points)
        stream.frames = [*stream.frames, np.array(current)][-self.window :]
        known = len(stream.frames) - 1  # frames whose positions are known
        stream.xy, stream.seen = stream.xy[-known:], stream.seen[-known:]
        anchor = _anchors(stream.seen)
        found, visible = self._run(np.stack(stream.frames), anchor, stream.xy[anchor, np.arange(len(points))])
        stream.xy = np.concatenate([stream.xy, found[-1:]])
        stream.seen = np.concatenate([stream.seen, visible[-1:]])
        self._streams = [*self._streams, stream][-self.max_streams :]
        return found[-1].copy(), visible[-1].copy()

    def reset(self) -> None:
        """Remove all streams and free their frames. Not needed for correctness."""
        self._streams = []

    def _stream_of(self, previous: Frame, points: Points) -> _Stream:
        """Remove the stream that ends in ``previous`` from the list and reorder its history to ``points``; or a new stream."""
        best, matched, common = -1, np.full(len(points), -1), 0
        for index, stream in enumerate(self._streams):
            last = stream.frames[-1]
            if last.shape == previous.shape and np.array_equal(last, previous):
                match = _match(points, stream.xy[-1])
                if (match >= 0).sum() > common:
                    best, matched, common = index, match, int((match >= 0).sum())
        if best < 0:
            return _Stream([np.array(previous)], points[None].copy(), np.ones((1, len(points)), np.bool_))
        stream = self._streams.pop(best)
        old = matched >= 0
        stream.xy = np.where(old[None, :, None], stream.xy[:, matched], points[None])
        stream.xy[-1] = points
        stream.seen = stream.seen[:, matched] & old
        stream.seen[-1] |= ~old
        return stream

    def _run(
        self, frames: NDArray[np.uint8], times: NDArray[np.intp], points: Points
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Model over (L, H, W, 3) with (N,) query frames and (N, 2) query points: (L, N, 2), (L, N)."""
        xy, seen = self._run_many(frames[None], times[None], points[None])
        return xy[0], seen[0]

    def _run_many(
        self, frames: NDArray[np.uint8], times: NDArray[np.intp], points: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Model over (B, L, H, W, 3) with (B, N) query frames and (B, N, 2) query points: (B, L, N, 2), (B, L, N)."""
        query = np.concatenate([times[..., None].astype(np.float32), points], axis=-1)  # (B, N, 3): t, x, y
        count, length = frames.shape[:2]
        load = f"{count} x {length} frames with {points.shape[1]} points"
        fix = f"lower batch={self.batch}, max_frames, window or the number of tracks"
        with inference(self.name, self.device, self.dtype, load, fix):
            video = torch.from_numpy(np.array(frames)).to(self.device).permute(0, 1, 4, 2, 3).float()  # RGB 0..255
            with _WholeExpand():
                tracks, visible = self._predictor(video, queries=torch.from_numpy(query).to(self.device))
            xy: NDArray[np.float32] = tracks.float().cpu().numpy()
            seen: NDArray[np.bool_] = visible.reshape(tracks.shape[:3]).bool().cpu().numpy()
        if not np.isfinite(xy).all():
            raise LocalmotionError(f"cotracker3: a position in {load} is not finite; use precision=float32")
        return xy, seen & _inside(xy, frames)


class _WholeExpand(TorchFunctionMode):
    """Makes ``expand`` copy: the pinned code flattens an expanded tensor with ``view``, which otherwise works for one clip only."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result.contiguous() if func is torch.Tensor.expand else result


def _check_points(points: Points) -> Points:
    if points.ndim != 2 or points.shape[1] != 2 or not np.isfinite(points).all():
        raise ValueError(f"points must be finite (N, 2), not {points.shape}")
    return points.astype(np.float32)


def _inside(xy: NDArray[np.float32], frames: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """(..., 2) positions -> (...) whether each is on a pixel of the frame."""
    height, width = frames.shape[-3:-1]
    x, y = xy[..., 0], xy[..., 1]
    return (x >= -0.5) & (x < width - 0.5) & (y >= -0.5) & (y < height - 0.5)


def _anchors(seen: NDArray[np.bool_]) -> NDArray[np.intp]:
    """(L, N) -> (N,) first frame in which each point was visible; the last frame for a point that never was."""
    return np.where(seen.any(0), seen.argmax(0), len(seen) - 1)


def _match(points: Points, known: Points) -> NDArray[np.intp]:
    """For each of (N, 2) points the index of the same point among (M, 2) known ones, or -1. The point's own slot has priority."""
    same = np.abs(points[:, None] - known[None]).max(-1) <= SAME_POINT  # (N, M)
    match = np.where(same.any(1), same.argmax(1), -1)
    slot = np.arange(min(len(points), len(known)))
    match[slot] = np.where(same[slot, slot], slot, match[slot])
    return match
