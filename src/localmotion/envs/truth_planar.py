"""Ground truth of motion in planar environments: parts are rigid outlines in a plane, so everything is exact up to rounding of float64.

Which part a pixel shows is that of its centre, found to an eighth of a pixel. The sky is infinitely far and does not move. A moving
background takes its place (`localmotion.envs.planar_backgrounds`); its motion is exact, too, and it counts as endless.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localmotion.envs.base import PixelEnv
from localmotion.envs.planar_drawing import Pose
from localmotion.envs.truth import SKY, UNKNOWN, Anchors, MotionTruth, Snapshot, look_up
from localmotion.errors import EnvError


@dataclass(frozen=True)
class PlanarSnapshot(Snapshot):
    """A picture's parts at one time. ``ident`` counts geoms, then sites, like the snapshots of MuJoCo scenes.

    place   (P,) complex128  position of each part in pixels, by its number; x right, imaginary part down
    turn    (P,) complex128  its rotation, of length 1
    moving  (P,) bool        it is on a body that is not welded to the world
    floor   int              number of the floor
    pose                     what was drawn
    sky     complex          how far the background has moved, in pixels; zero where the sky shows
    """

    place: NDArray[np.complex128]
    turn: NDArray[np.complex128]
    moving: NDArray[np.bool_]
    floor: int
    pose: Pose
    sky: complex


class PlanarTruth(MotionTruth):
    """Exact motion of a ``planar:`` environment. It must have been reset before the first snapshot.

    Raises:
        EnvError: the environment draws no planar parts.
    """

    def __init__(self, env: PixelEnv) -> None:
        if not hasattr(type(env), "painter"):
            raise EnvError(f"{env.name}: its pictures do not consist of planar parts; use motion_truth(env)")
        self._env: Any = env

    def snapshot(self, size: int | None = None) -> PlanarSnapshot:
        """Parts of the current picture, at ``size`` or the drawn size. Raises EnvError before the first reset."""
        side = size or self._env.draw_size
        pose, painter = self._env.pose(), self._env.painter
        numbers = painter.numbers.astype(np.int64)
        place, turn = (np.zeros(numbers.max() + 1, np.complex128) for _ in range(2))
        moving = np.zeros(len(place), bool)
        place[numbers], turn[numbers], moving[numbers] = painter.in_pixels(pose, side), pose.turn, painter.moving
        idents = self._env.part_ids(side).astype(np.int32)
        return PlanarSnapshot(idents, place, turn, moving, int(numbers[-1]), pose, pose.drift * side)

    def anchor(self, at: PlanarSnapshot, points: NDArray[np.floating[Any]]) -> Anchors:
        """Points on the parts in front, or in the sky."""
        ident, _, _ = look_up(at, points)
        places = np.asarray(points, np.float64) @ np.array([1, 1j])
        part, solid = np.maximum(ident, 0), ident >= 0
        local = np.where(solid, (places - at.place[part]) * at.turn[part].conj(), places - at.sky)
        return Anchors(ident, np.column_stack([local.real, local.imag, np.zeros(len(local))]))

    def locate(self, at: PlanarSnapshot, anchors: Anchors) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Points moved with their parts; depth is zero."""
        local = anchors.local @ np.array([1, 1j, 0])
        part = np.maximum(anchors.ident, 0)
        places = np.where(anchors.ident >= 0, at.place[part] + at.turn[part] * local, at.sky + local)
        points = np.column_stack([places.real, places.imag])
        points[anchors.ident == UNKNOWN] = np.nan
        return points, np.zeros(len(points))

    def motion(self, a: PlanarSnapshot, b: PlanarSnapshot) -> NDArray[np.float32]:
        """As `MotionTruth.motion`, in the time of one field."""
        field: NDArray[np.float32] = self._env.painter.flow(a.pose, b.pose, a.size)
        return field

    def foreground(self, at: PlanarSnapshot) -> NDArray[np.bool_]:
        """Pixels of parts on bodies that are not welded to the world."""
        return np.asarray((at.ident >= 0) & at.moving[np.maximum(at.ident, 0)])

    def camera_flow(self, a: PlanarSnapshot, b: PlanarSnapshot) -> NDArray[np.float32]:
        """Motion of the world at every pixel; zero in the sky. With a moving background, its motion at every pixel, as in the toys."""
        drift, shift = b.sky - a.sky, b.place[a.floor] - a.place[a.floor]
        if self._env.background != "none":
            shift = drift
        moved = np.where(a.ident == SKY, drift, shift)
        return np.stack([moved.real, moved.imag], -1).astype(np.float32)
