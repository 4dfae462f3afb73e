"""Ground truth of motion: exact optical flow, occlusion, point tracks and moving-body masks from the state of an environment.

One interface, `MotionTruth`, for all environments. `motion_truth` chooses the implementation: rendered depth and geom poses for MuJoCo
(`localmotion.envs.truth_mujoco`), rigid parts in a plane for planar bodies (`localmotion.envs.truth_planar`), layers with known offsets
for the toys. Conventions are perception's: points are (x, y) in pixels of the picture, the centre of the top-left pixel is (0, 0);
``flow[y, x]`` is the motion of the surface in that pixel.

Flow is the motion of surfaces, as in every flow benchmark. Shadows, highlights and reflections move over them and are not followed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from localmotion.envs.base import PixelEnv
from localmotion.errors import EnvError

UNKNOWN = -2
"""Pixel with unknown motion (see the subclass)."""
SKY = -1
"""Pixel of the sky. It is infinitely far and moves only if the camera rotates."""


@dataclass(frozen=True)
class Snapshot:
    """The state of an environment's picture at one time.

    ident  (S, S) int32  the part visible in each pixel: its number (>= 0), `SKY`, `UNKNOWN`
    """

    ident: NDArray[np.int32]

    @property
    def size(self) -> int:
        """S."""
        return len(self.ident)


class Anchors(NamedTuple):
    """N points fixed to parts: ``ident`` (N,) the part, ``local`` (N, 3) the position in the part's own frame."""

    ident: NDArray[np.int32]
    local: NDArray[np.float64]


class MotionTruth:
    """Exact motion between snapshots of one environment.

    A subclass defines the snapshot, fixes points to their part (`anchor`), finds them at another time (`locate`), and knows which parts can
    move (`foreground`).
    """

    def snapshot(self, size: int | None = None) -> Any:
        """Store the current state. Call after ``reset`` and each ``step``; ``size`` is the environment's drawn size unless given."""
        raise NotImplementedError

    def anchor(self, at: Any, points: NDArray[np.floating[Any]]) -> Anchors:
        """Fix (N, 2) points to the visible parts; points outside the picture become `UNKNOWN`."""
        raise NotImplementedError

    def locate(self, at: Any, anchors: Anchors) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Positions of anchored points: (N, 2) pixels, NaN if unknown or behind the camera, and (N,) depth along the optical axis."""
        raise NotImplementedError

    def foreground(self, at: Any) -> NDArray[np.bool_]:
        """(S, S) pixels of parts that can move relative to the world, also if they do not move now."""
        raise NotImplementedError

    def camera_flow(self, a: Any, b: Any) -> NDArray[np.float32]:
        """(S, S, 2) flow from ``a`` to ``b`` if only the camera had moved."""
        raise NotImplementedError

    def _agrees(
        self, at: Any, rows: NDArray[np.int64], columns: NDArray[np.int64], depth: NDArray[np.float64]
    ) -> NDArray[np.bool_]:
        """Whether pixels (N,) show a surface at (N,) ``depth``. True if a part has only one surface."""
        return np.ones(len(rows), bool)

    def flow(self, a: Any, b: Any) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Flow from snapshot ``a`` to ``b``; either may be the earlier one.

        Returns:
            flow: (S, S, 2) float32, x then y in pixels; zero where it is unknown.
            valid: (S, S) bool, the surface is also visible at ``b``: inside the picture and not hidden. If it is False but the motion is
                known, ``flow`` is still the exact motion of the hidden point.
        """
        side = a.size
        grid = pixel_grid(side)
        anchors = self.anchor(a, grid)
        points, depth = self.locate(b, anchors)
        valid = self.seen(b, anchors, points, depth)
        moved = np.where(np.isfinite(points), points - grid, 0.0)
        return moved.reshape(side, side, 2).astype(np.float32), valid.reshape(side, side)

    def motion(self, a: Any, b: Any) -> NDArray[np.float32]:
        """The flow of `flow` alone, (S, S, 2); it costs less."""
        grid = pixel_grid(a.size)
        points, _ = self.locate(b, self.anchor(a, grid))
        return np.where(np.isfinite(points), points - grid, 0.0).reshape(a.size, a.size, 2).astype(np.float32)

    def tracks(
        self, snapshots: Sequence[Any], points: NDArray[np.floating[Any]], start: int = 0
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Follow points anchored in snapshot ``start`` through all snapshots, forward and backward.

        Args:
            snapshots: T of them, of one size.
            points: (N, 2) pixels in snapshot ``start``.
            start: index of the snapshot of the points.

        Returns:
            tracks: (T, N, 2) float32; the starting point where a position is unknown.
            visible: (T, N) bool: inside the picture and not hidden. At ``start`` all points with known motion are visible.
        """
        points = np.asarray(points, np.float64)
        anchors = self.anchor(snapshots[start], points)
        tracks = np.empty((len(snapshots), len(points), 2), np.float32)
        visible = np.empty(tracks.shape[:2], bool)
        for t, snapshot in enumerate(snapshots):
            places, depth = self.locate(snapshot, anchors)
            visible[t] = self.seen(snapshot, anchors, places, depth)
            tracks[t] = np.where(np.isfinite(places), places, points)
        visible[start] = anchors.ident != UNKNOWN
        return tracks, visible

    def seen(self, at: Any, anchors: Anchors, points: NDArray[np.float64], depth: NDArray[np.float64]) -> NDArray[np.bool_]:
        """(N,) whether anchored points, located at ``points`` and ``depth``, are visible in the picture.

        Of the bilinear weights of the four pixels around a point, at least half must show the same part at the same depth.
        """
        side = at.size
        known = np.isfinite(points).all(1) & (anchors.ident != UNKNOWN)
        inside = known & ((points >= -0.5) & (points <= side - 0.5)).all(1)
        result = np.zeros(len(points), bool)
        index = np.flatnonzero(inside)
        x, y = points[index].T
        left, top = np.floor(x).astype(np.int64), np.floor(y).astype(np.int64)
        votes = np.zeros(len(index))
        for dx in (0, 1):
            for dy in (0, 1):
                weight = np.abs(1 - dx - (x - left)) * np.abs(1 - dy - (y - top))
                rows, columns = np.clip(top + dy, 0, side - 1), np.clip(left + dx, 0, side - 1)
                same = at.ident[rows, columns] == anchors.ident[index]
                same &= self._agrees(at, rows, columns, depth[index])
                votes += weight * same
        result[index] = votes >= 0.5 - 1e-9
        return result


@dataclass(frozen=True)
class Layers(Snapshot):
    """A picture of flat layers, each moved by a shift.

    origin  (L, 2) float64  position of each layer, pixels of this picture; only differences between snapshots matter
    moving  (L,)   bool     the layer belongs to the agent: foreground
    """

    origin: NDArray[np.float64]
    moving: NDArray[np.bool_]


class LayerTruth(MotionTruth):
    """Truth of an environment whose pictures are layers: ``env.layers(size)`` returns them. Everything is exact up to rounding of float64.

    A background on a torus counts as endless: a point that leaves on one side does not return on the other.
    """

    def __init__(self, env: PixelEnv) -> None:
        if not hasattr(env, "layers"):
            raise EnvError(f"{env.name}: its pictures do not consist of layers; use motion_truth(env)")
        self._env: Any = env

    def snapshot(self, size: int | None = None) -> Layers:
        """Layers of the current picture, at ``size`` or the drawn size."""
        layers: Layers = self._env.layers(size or self._env.draw_size)
        return layers

    def anchor(self, at: Layers, points: NDArray[np.floating[Any]]) -> Anchors:
        """Points on the layers in front."""
        ident, _, _ = look_up(at, points)
        known = ident >= 0
        local = np.zeros((len(points), 3))
        local[known, :2] = np.asarray(points, np.float64)[known] - at.origin[ident[known]]
        return Anchors(ident, local)

    def locate(self, at: Layers, anchors: Anchors) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Origin of the layer plus the position in it; depth is zero."""
        known = anchors.ident >= 0
        points = np.full((len(known), 2), np.nan)
        points[known] = at.origin[anchors.ident[known]] + anchors.local[known, :2]
        return points, np.zeros(len(known))

    def foreground(self, at: Layers) -> NDArray[np.bool_]:
        """Pixels of the agent."""
        return np.asarray(at.moving[at.ident])

    def camera_flow(self, a: Layers, b: Layers) -> NDArray[np.float32]:
        """Motion of layer 0, the background, at every pixel, which a homography would remove."""
        shift = (b.origin[0] - a.origin[0]).astype(np.float32)
        return np.broadcast_to(shift, (a.size, a.size, 2)).copy()


def pixel_grid(side: int) -> NDArray[np.float64]:
    """Centres of all pixels, row by row: (side * side, 2), x then y."""
    ys, xs = np.indices((side, side), dtype=np.float64)
    return np.stack([xs.ravel(), ys.ravel()], 1)


def look_up(at: Snapshot, points: NDArray[np.floating[Any]]) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]:
    """Parts (N,) visible in the pixels nearest to (N, 2) points, `UNKNOWN` outside the picture, and those pixels' rows and columns (N,)."""
    points = np.asarray(points, np.float64)
    if points.ndim != 2 or points.shape[1] != 2 or not np.isfinite(points).all():
        raise EnvError(f"points must be finite and (N, 2), got shape {points.shape}; give x and y in pixels")
    side = at.size
    inside = ((points >= -0.5) & (points <= side - 0.5)).all(1)
    columns, rows = np.clip(np.floor(points + 0.5).astype(np.int64), 0, side - 1).T
    return np.where(inside, at.ident[rows, columns], UNKNOWN).astype(np.int32), rows, columns


def motion_truth(env: PixelEnv) -> MotionTruth:
    """The ground truth of an environment made by `make_env`.

    An environment that paints something over its scene has a method ``painted_mask(size) -> (S, S) bool`` for the current picture; the
    motion of these pixels is unknown.

    Raises:
        EnvError: an environment without layers, planar parts and a MuJoCo scene.
    """
    if hasattr(env, "layers"):
        return LayerTruth(env)
    if hasattr(type(env), "painter"):
        from localmotion.envs.truth_planar import PlanarTruth

        return PlanarTruth(env)
    from localmotion.envs.truth_mujoco import MujocoTruth

    return MujocoTruth(env)
