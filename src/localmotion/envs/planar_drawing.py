"""Drawing of planar bodies without OpenGL: anti-aliased convex outlines of flat colours over a patterned floor, and which part each pixel
shows.

Every drawn geom and site is a *part*. Its outline in the plane of the picture is a fixed polygon that moves rigidly, so its motion between
two pictures is exact. Positions in the plane are complex numbers: the real part points to the right, the imaginary part DOWN, as
in pictures. A pixel's position is complex, too; 0 is the centre of the top-left pixel.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from localmotion.envs.masks import AGENT, OTHER, SOLID, AgentParts

CORNERS = 32
"""Corners of an outline. Those of a circle lie on it; the polygon's area is 0.6 % smaller."""
SHIFT = 8
"""Fractional bits of OpenCV's fixed-point coordinates."""
SAMPLES, FINE = 2, 4
"""Pictures are drawn, anti-aliased, at SAMPLES times their side and averaged; parts at FINE times, of which the pixels' centres are used."""
COLOURS = (
    (232, 119, 64), (64, 148, 214), (242, 190, 70), (112, 178, 92), (168, 116, 206), (228, 120, 160), (72, 186, 172), (190, 150, 110),
)  # fmt: skip
TARGET, DECORATION = (206, 62, 70), (84, 104, 132)
FAR = 0.68
"""Brightness of parts behind the plane through the agent's first part, e.g. of the walker's left leg."""
SKY_TOP, SKY_BOTTOM = (164, 196, 226), (226, 234, 238)
FLOOR = (104, 116, 100)
CONTRAST = 0.3
"""Largest difference of a tile from the floor's brightness."""
TILES = 16
"""Tiles after which the floor's pattern repeats, in each direction. No two neighbours are alike, so motion is visible in it."""


@dataclass(frozen=True)
class View:
    """The window of a picture.

    above   seen from above (x right, y up) rather than from the side (x right, z up)
    half    half the picture's side, metres
    middle  height of the picture's centre, metres; from above it is not used
    follows dm_control's first camera moves with a body's centre of mass, so this window does: from the side only horizontally
    tile    side of a floor tile, metres
    """

    above: bool = False
    half: float = 1.0
    middle: float = 0.0
    follows: bool = False
    tile: float = 0.25


@dataclass(frozen=True)
class Pose:
    """All parts at one time.

    place  (K,) complex128  position in the plane, metres
    turn   (K,) complex128  rotation, of length 1
    eye    complex          position in the plane of the picture's centre
    """

    place: NDArray[np.complex128]
    turn: NDArray[np.complex128]
    eye: complex
    seen: dict[int, NDArray[np.uint8]] = field(default_factory=dict, repr=False, compare=False)
    """Codes of pixels by size, kept by `Painter.codes`."""


class Painter:
    """Draws the parts of one MuJoCo model in their reference state; valid until the model's sizes or colours change.

    Part K - 1 is the world (the floor). In (S, S) codes 0 is the sky and k + 1 is part k.

    Args:
        model, data: mujoco.MjModel and mujoco.MjData with current positions.
        view: the window.
        kinds: which geoms and sites belong to the agent.
        camera: number of the camera whose body the window follows.

    Attributes:
        numbers: (K,) int16, the number of each part: that of its geom, or the number of geoms plus that of its site. The world has
            the number of its floor.
        agent: (K,) bool, the part belongs to the agent.
        moving: (K,) bool, the part is on a body that is not welded to the world.
    """

    def __init__(self, model: Any, data: Any, view: View, kinds: AgentParts, camera: int = 0) -> None:
        self.view, self._data = view, data
        self._rows = np.array([0, 1 if view.above else 2])
        self._body = int(model.cam_bodyid[camera])
        away = np.array([0.0, 0.0, -1.0] if view.above else [0.0, 1.0, 0.0])  # from the viewer
        parts = [
            (kind, number)
            for kind, count in (("geom", model.ngeom), ("site", model.nsite))
            for number in range(count)
            if _drawn(model, kind, number, view.above)
        ]
        outlines, near, far = [], [], []
        for kind, number in parts:
            points = _outline(model, data, kind, number, view.above)
            outlines.append(points)
            position = getattr(data, f"{kind}_xpos")[number]
            far.append(float(position @ away))
            near.append(round(float(position @ away) - _thickness(model, data, kind, number, away), 6))
        floor = next((i for i in range(model.ngeom) if _is_floor(model, i)), -1)
        sites = np.array([kind == "site" for kind, _ in parts], bool)
        index = np.array([number for _, number in parts], np.int64)
        self._geoms, self._sites = index[~sites], index[sites]
        self.numbers = np.append(index + model.ngeom * sites, floor).astype(np.int16)
        owner = np.append(np.where(sites, kinds.sites[index * sites], kinds.geoms[index * ~sites]), 0)
        self.agent = owner == AGENT
        body = np.where(sites, model.site_bodyid[index * sites] if model.nsite else 0, model.geom_bodyid[index * ~sites])
        self.moving = np.append((model.body_weldid[body] != 0) | (model.body_mocapid[body] >= 0), False)
        self.moving[:-1][body == 0] = False
        self._columns = np.append(
            _steady_columns(data.geom_xmat[self._geoms], self._rows), _steady_columns(data.site_xmat[self._sites], self._rows)
        ).astype(np.int64)
        self._ground = float(data.geom_xpos[floor, 2]) if floor >= 0 else -np.inf
        pose = self.pose()
        self._local = (np.array(outlines) - pose.place[:-1, None]) * pose.turn[:-1, None].conj()
        # The nearest surface is drawn last. Targets are behind everything: they may not hide the agent.
        layer = [-np.inf if owner[k] == OTHER else -near[k] for k in range(len(parts))]
        self._order = sorted(range(len(parts)), key=lambda k: layer[k])
        first = next((far[k] for k in range(len(parts)) if self.agent[k]), 0.0)
        self._colours = _colours(model, parts, owner, [value > first + 1e-6 for value in far])
        self._scenes: dict[int, _Scenery] = {}

    def pose(self) -> Pose:
        """Where the parts are now."""
        data, rows = self._data, self._rows
        centres = np.concatenate([data.geom_xpos[self._geoms], data.site_xpos[self._sites], _NOWHERE])
        frames = np.concatenate([data.geom_xmat[self._geoms], data.site_xmat[self._sites]])
        place = centres[:, 0] - 1j * centres[:, rows[1]]
        each = np.arange(len(frames))
        axis = frames[each, self._columns] - 1j * frames[each, 3 * rows[1] + self._columns]
        turn = np.append(axis / np.abs(axis), 1.0)
        view = self.view
        eye = 0j if view.above else -1j * view.middle
        if view.follows:
            followed = data.subtree_com[self._body]
            eye += followed[0] - (1j * followed[1] if view.above else 0)
        return Pose(place, turn, complex(eye))

    def in_pixels(self, pose: Pose, size: int) -> NDArray[np.complex128]:
        """(K,) positions of the parts in a picture of side ``size``."""
        return (pose.place - pose.eye) * self._zoom(size) + (size - 1) / 2 * (1 + 1j)

    def _zoom(self, size: int) -> float:
        return size / (2 * self.view.half)

    def _corners(self, pose: Pose, size: int, scale: int, offset: float) -> NDArray[np.int32]:
        """(K - 1, CORNERS, 2) corners in fixed point, in a picture drawn at ``scale`` times ``size``; pixel 0 there is ``offset`` from
        the centre of pixel 0."""
        zoom = self._zoom(size) * scale
        middle = (size - 1) / 2 * scale + offset
        place, turn = (pose.place[:-1] - pose.eye) * zoom + middle * (1 + 1j), pose.turn[:-1] * zoom
        corners = place[:, None] + turn[:, None] * self._local
        fixed = np.rint(corners.view(np.float64) * (1 << SHIFT))
        return fixed.reshape(*corners.shape, 2).astype(np.int32)

    def picture(self, pose: Pose, size: int) -> NDArray[np.uint8]:
        """(S, S, 3) uint8 RGB."""
        large = self._scenery(size).behind(pose)
        corners = self._corners(pose, size, SAMPLES, (SAMPLES - 1) / 2)
        for k in self._order:
            cv2.fillConvexPoly(large, corners[k], self._colours[k], cv2.LINE_AA, SHIFT)
        return np.asarray(cv2.resize(large, (size, size), interpolation=cv2.INTER_AREA), np.uint8)

    def codes(self, pose: Pose, size: int) -> NDArray[np.uint8]:
        """(S, S) codes of the parts at the centres of the pixels: 0 is the sky, k + 1 is part k. Kept in the pose; do not change it."""
        found = pose.seen.get(size)
        if found is None:
            large = self._scenery(size).codes.copy()
            corners = self._corners(pose, size, FINE, 0.0)
            for k in self._order:
                cv2.fillConvexPoly(large, corners[k], k + 1, cv2.LINE_8, SHIFT)
            found = pose.seen[size] = np.ascontiguousarray(large[::FINE, ::FINE])
        return found

    def flow(self, a: Pose, b: Pose, size: int) -> NDArray[np.float32]:
        """(S, S, 2) float32 motion from ``a`` to ``b`` of what the pixels of ``a`` show, x then y; exact, zero in the sky."""
        turned = b.turn * a.turn.conj()
        start = self.in_pixels(a, size)
        moved = self.in_pixels(b, size) - turned * start
        # Codes start at the sky, which stays where it is.
        factor, shift = (np.concatenate([[0.0], x]).astype(np.complex64) for x in (turned - 1, moved))
        codes = self.codes(a, size)
        field = factor.take(codes)
        field *= self._scenery(size).pixels
        field += shift.take(codes)
        return field.view(np.float32).reshape(size, size, 2)

    def _scenery(self, size: int) -> _Scenery:
        scene = self._scenes.get(size)
        if scene is None:
            scene = self._scenes[size] = _Scenery(self.view, self._ground, size, len(self.numbers))
        return scene


class _Scenery:
    """Sky and floor at one size.

    codes   (FINE S, FINE S) uint8  the parts behind everything
    pixels  (S, S) complex64        positions of the pixels
    """

    def __init__(self, view: View, ground: float, size: int, floor: int) -> None:
        side = SAMPLES * size
        self.size, self._side = size, side
        self._zoom = side / (2 * view.half)
        line = np.arange(size, dtype=np.float32)
        self.pixels = (line + 1j * line[:, None]).astype(np.complex64)
        # Heights of rows: of the drawn picture's edges, and of the pixels' centres at which parts are found.
        horizon = -np.inf if view.above else (view.middle + view.half - ground) * self._zoom  # in rows of the drawn picture
        rows = (np.arange(FINE * size) / FINE + 0.5) * SAMPLES
        self.codes = np.zeros((FINE * size, FINE * size), np.uint8)
        self.codes[rows >= horizon] = floor
        shade = np.linspace(0, 1, side)[:, None, None] ** 1.5
        sky = (1 - shade) * np.array(SKY_TOP) + shade * np.array(SKY_BOTTOM)
        self._sky = np.ascontiguousarray(np.broadcast_to(np.rint(sky), (side, side, 3)), np.uint8)
        self._above, self._follows = view.above, view.follows
        self._top = 0 if view.above else min(max(int(np.floor(horizon)), 0), side)
        self._period = TILES * view.tile * self._zoom
        across = _tiles(int(np.ceil(self._period)) + side + 2, view.tile * self._zoom)
        if view.above:
            pattern = _PATTERN[across[:, None], across[None, :]]
        else:
            below = (np.arange(self._top, side) + 0.5 - horizon) / (view.tile * self._zoom)
            pattern = _PATTERN[np.floor(np.maximum(below, 0)).astype(int)[:, None] % TILES, across[None, :]]
        floor_picture = np.rint(np.array(FLOOR) * (1 + CONTRAST * pattern[..., None])).clip(0, 255)
        if not view.above and self._top < side:  # the row that shows both sky and floor
            part = float(np.clip(self._top + 1 - horizon, 0, 1))
            floor_picture[0] = part * floor_picture[0] + (1 - part) * self._sky[self._top, 0]
        self._floor = np.ascontiguousarray(floor_picture, np.uint8)
        self._still = None if view.follows else self._compose(0j)

    def behind(self, pose: Pose) -> NDArray[np.uint8]:
        """A new (SAMPLES S, SAMPLES S, 3) picture of sky and floor."""
        return self._compose(pose.eye) if self._still is None else self._still.copy()

    def _compose(self, eye: complex) -> NDArray[np.uint8]:
        picture, height = self._sky.copy(), self._side - self._top
        if height <= 0:
            return picture
        # Left edge of the picture in the pattern, with a fraction of a pixel; the pattern begins at zero.
        left = (eye.real * self._zoom - self._side / 2) % self._period
        upper = (eye.imag * self._zoom - self._side / 2) % self._period if self._above else 0.0
        centre = (left + (self._side - 1) / 2, upper + (height - 1) / 2)
        picture[self._top :] = cv2.getRectSubPix(self._floor, (self._side, height), centre)
        return picture


_NOWHERE = np.zeros((1, 3))
_PATTERN = np.random.default_rng(7).permutation(np.linspace(-1, 1, TILES * TILES)).reshape(TILES, TILES)


def _tiles(length: int, side: float) -> NDArray[np.int64]:
    """(length,) the tile of each pixel."""
    return np.floor((np.arange(length) + 0.5) / side).astype(np.int64) % TILES


def _is_floor(model: Any, geom: int) -> bool:
    """Whether a geom is a horizontal plane; other planes are walls."""
    return int(model.geom_type[geom]) == 0 and abs(float(model.geom_quat[geom, 0])) > 0.99


def _drawn(model: Any, kind: str, number: int, above: bool) -> bool:
    if kind == "site":
        return int(model.site_group[number]) < 3 and float(model.site_rgba[number, 3]) >= SOLID
    material = int(model.geom_matid[number])
    opacity = model.mat_rgba[material, 3] if material >= 0 else model.geom_rgba[number, 3]
    plane = int(model.geom_type[number]) == 0
    return float(opacity) >= SOLID and int(model.geom_group[number]) < 3 and not (plane and (_is_floor(model, number) or not above))
