"""Drawing of planar bodies without OpenGL: anti-aliased convex outlines of flat colours over a patterned floor, and which part each pixel
shows.

Every drawn geom and site is a *part*. Its outline in the plane of the picture is a fixed polygon that moves rigidly, so its motion between
two pictures is exact. Positions in the plane are complex numbers: the real part points to the right, the imaginary part DOWN, as
in pictures. A pixel's position is complex, too; 0 is the centre of the top-left pixel.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

import cv2
import numpy as np
from numpy.typing import NDArray

from localmotion.envs.masks import AGENT, OTHER, SOLID, AgentParts
from localmotion.errors import EnvError

if TYPE_CHECKING:
    from localmotion.envs.planar_backgrounds import MovingBackground

_PLANE, _SPHERE, _CAPSULE, _ELLIPSOID, _CYLINDER, _BOX = 0, 2, 3, 4, 5, 6  # mujoco.mjtGeom
WALL = 0.004
"""Half the thickness with which walls (planes on edge) are drawn, metres."""

CORNERS = 32
"""Corners of an outline. Those of a circle lie on it; the polygon's area is 0.6 % smaller."""
SHIFT = 8
"""Fractional bits of OpenCV's fixed-point coordinates."""
SAMPLES, FINE = 2, 4
"""Pictures are drawn at SAMPLES times their side, anti-aliased, and averaged. Parts are found at FINE times their side, at the pixels'
centres."""
SAMPLES_INSET, FINE_INSET = 0.62, 0.45
"""OpenCV fills more than a polygon: about this many drawn pixels on every side, with anti-aliasing and without. Outlines are drawn so much
smaller, so that parts cover their true areas (tested)."""
THINNEST = 1.5
"""Pixels of the picture that a part is wide at least. A thinner one would be missing at the centres of pixels, so it is drawn wider."""
COLOURS = (
    (232, 119, 64), (64, 148, 214), (242, 190, 70), (112, 178, 92), (168, 116, 206), (228, 120, 160), (72, 186, 172), (190, 150, 110),
)  # fmt: skip
BAND_CORNERS = 12
Look = Literal["flat", "textured"]
LOOKS: tuple[Look, ...] = get_args(Look)
BANDS = ((0.12, 0.32, 0.62), (0.5, 0.62, 1.5), (0.74, 0.86, 0.62))
"""Bands across a textured part: where they begin and end as shares of its length, and their brightness. Not symmetric, so a turn shows."""
TARGET, DECORATION = (206, 62, 70), (84, 104, 132)
FAR = 0.68
"""Brightness of parts behind the plane through the agent's first part, e.g. of the walker's left leg."""
SKY_TOP, SKY_BOTTOM = (164, 196, 226), (226, 234, 238)
FLOOR = (104, 116, 100)
CONTRAST = 0.25
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

    @property
    def axes(self) -> NDArray[np.float64]:
        """(3, 3) rotation from the world to the picture: rows right, down, forward."""
        if self.above:
            return np.diag([1.0, -1.0, -1.0])
        return np.array([[1.0, 0.0, 0.0], [0.0, 0.0, -1.0], [0.0, 1.0, 0.0]])


@dataclass(frozen=True)
class Pose:
    """All parts at one time.

    place  (K,) complex128  position in the plane, metres
    turn   (K,) complex128  rotation, of length 1
    eye    complex          position in the plane of the picture's centre
    drift  complex          how far a moving background has moved, in sides of the picture
    """

    place: NDArray[np.complex128]
    turn: NDArray[np.complex128]
    eye: complex
    drift: complex = 0j
    seen: dict[int, NDArray[np.uint8]] = field(default_factory=dict, repr=False, compare=False)
    """Codes of pixels by size, kept by `Painter.codes`."""

    def equals(self, other: Pose) -> bool:
        """Whether everything is in the same place, bit for bit."""
        return (
            (self.eye, self.drift) == (other.eye, other.drift)
            and self.place.tobytes() == other.place.tobytes()
            and self.turn.tobytes() == other.turn.tobytes()
        )


class Painter:
    """Draws the parts of one MuJoCo model in their reference state; valid until the model's sizes or colours change.

    Part K - 1 is the world (the floor). In (S, S) codes 0 is the sky (or a moving background) and k + 1 is part k.

    Args:
        model, data: mujoco.MjModel and mujoco.MjData with current positions.
        view: the window.
        kinds: which geoms and sites belong to the agent.
        camera: number of the camera whose body the window follows.
        look: "flat": parts of one colour; "textured": with bands across them, so that motion is visible inside them.
        background: what moves behind the parts instead of sky and floor.

    Attributes:
        numbers: (K,) int16, the number of each part: that of its geom, or the number of geoms plus that of its site. The world has
            the number of its floor.
        agent: (K,) bool, the part belongs to the agent.
        moving: (K,) bool, the part is on a body that is not welded to the world.
    """

    def __init__(
        self,
        model: Any,
        data: Any,
        view: View,
        kinds: AgentParts,
        camera: int = 0,
        look: Look = "flat",
        background: MovingBackground | None = None,
    ) -> None:
        self.view, self.look, self._data, self._background = view, look, data, background
        rows = np.array([0, 1 if view.above else 2])
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
            outlines.append(_outline(model, data, kind, number, view.above))
            position = getattr(data, f"{kind}_xpos")[number]
            far.append(float(position @ away))
            near.append(round(float(position @ away) - _thickness(model, data, kind, number, away), 6))
        floor = next((i for i in range(model.ngeom) if _is_floor(model, i)), -1)
        sites = np.array([kind == "site" for kind, _ in parts], bool)
        index = np.array([number for _, number in parts], np.int64)
        number = index + model.ngeom * sites
        self.numbers = np.append(number, floor).astype(np.int16)
        owner = np.concatenate([kinds.geoms, kinds.sites])[number]
        self.agent = np.append(owner == AGENT, False)
        body = np.concatenate([model.geom_bodyid, model.site_bodyid])[number]
        free = (model.body_weldid != 0) | (model.body_mocapid >= 0)
        self.moving = np.append(free[body], False)
        self._with_sites = bool(sites.any())
        # Where the plane's two coordinates of each part's position and of its steady axis lie in MuJoCo's arrays, geoms before sites.
        columns = _steady_columns(np.concatenate([data.geom_xmat, data.site_xmat])[number], rows)
        self._in_centres = 3 * number[:, None] + rows
        self._in_frames = 9 * number[:, None] + 3 * rows + columns[:, None]
        self._ground = float(data.geom_xpos[floor, 2]) if floor >= 0 else -np.inf
        pose = self.pose()
        corners, outward = np.moveaxis(np.array(outlines).reshape(-1, 2, CORNERS), 1, 0)
        self._local = (corners - pose.place[:-1, None]) * pose.turn[:-1, None].conj()
        self._outward = outward * pose.turn[:-1, None].conj()
        across = np.exp(2j * np.pi * np.arange(CORNERS) / CORNERS).conj()
        self._thin = (self._local[:, :, None] * across).real.max(1).min(1)  # half the width where a part is narrowest
        # The nearest surface is drawn last. Targets are behind everything: they may not hide the agent.
        layer = [-np.inf if owner[k] == OTHER else -near[k] for k in range(len(parts))]
        self._order = sorted(range(len(parts)), key=lambda k: layer[k])
        first = next((far[k] for k in range(len(parts)) if self.agent[k]), 0.0)
        self._colours = _colours(model, parts, owner, [value > first + 1e-6 for value in far])
        self._band_colours = [
            [tuple(min(255.0, light * value) for value in colour) for _, _, light in BANDS] for colour in self._colours
        ]
        self._banded: dict[int, NDArray[np.complex128]] = {}
        self._scenes: dict[int, _Scenery] = {}
        self._shapes: dict[tuple[int, int], NDArray[np.complex128]] = {}

    def pose(self) -> Pose:
        """Where the parts are now."""
        data = self._data
        centres, frames = data.geom_xpos.ravel(), data.geom_xmat.ravel()
        if self._with_sites:
            centres, frames = np.concatenate([centres, data.site_xpos.ravel()]), np.concatenate([frames, data.site_xmat.ravel()])
        place, turn = np.zeros(len(self.numbers), np.complex128), np.ones(len(self.numbers), np.complex128)
        np.conjugate(centres.take(self._in_centres).view(np.complex128)[:, 0], out=place[:-1])
        axis = frames.take(self._in_frames).view(np.complex128)[:, 0]
        np.divide(axis.conj(), np.abs(axis), out=turn[:-1])
        view = self.view
        eye = 0j if view.above else -1j * view.middle
        if view.follows:
            followed = data.subtree_com[self._body]
            eye += followed[0] - (1j * followed[1] if view.above else 0)
        return Pose(place, turn, complex(eye), 0j if self._background is None else self._background.drift)

    def in_pixels(self, pose: Pose, size: int) -> NDArray[np.complex128]:
        """(K,) positions of the parts in a picture of side ``size``."""
        return self.to_pixels(pose.place, pose, size)

    def to_pixels(self, places: NDArray[np.complex128], pose: Pose, size: int) -> NDArray[np.complex128]:
        """(N,) points of the plane, in metres, in the picture of ``pose`` with side ``size``."""
        return (places - pose.eye) * self._zoom(size) + (size - 1) / 2 * (1 + 1j)

    def _zoom(self, size: int) -> float:
        return size / (2 * self.view.half)

    def _shape(self, size: int, scale: int, inset: float) -> NDArray[np.complex128]:
        """(K - 1, CORNERS) outlines in the parts' own frames, in pixels drawn at ``scale`` times ``size``, smaller by ``inset``."""
        shape = self._shapes.get((size, scale))
        if shape is None:
            zoom = self._zoom(size) * scale
            smaller = np.minimum(inset, self._thin * zoom - THINNEST / 2 * scale + inset)
            shape = self._shapes[size, scale] = self._local * zoom - self._outward * smaller[:, None]
        return shape

    def _bands(self, size: int) -> NDArray[np.complex128]:
        """(K - 1, bands, BAND_CORNERS) corners of the bands in the parts' own frames, in pixels of the drawn picture."""
        bands = self._banded.get(size)
        if bands is None:
            outlines = self._shape(size, SAMPLES, SAMPLES_INSET)
            bands = self._banded[size] = np.array([[_band(o, *band[:2], SAMPLES_INSET) for band in BANDS] for o in outlines])
        return bands

    def _corners(self, pose: Pose, size: int, scale: int, offset: float, inset: float) -> NDArray[np.int32]:
        """(K - 1, CORNERS, 2) corners in fixed point, in a picture drawn at ``scale`` times ``size``; pixel 0 there is ``offset`` from
        the centre of pixel 0. Outlines are smaller by ``inset`` drawn pixels."""
        return self._fixed(pose, size, scale, offset, self._shape(size, scale, inset))

    def _fixed(self, pose: Pose, size: int, scale: int, offset: float, shape: NDArray[np.complex128]) -> NDArray[np.int32]:
        """(K - 1, ..., 2) fixed-point positions of (K - 1, ...) points of the parts' own frames."""
        middle = (size - 1) / 2 * scale + offset
        place = (pose.place[:-1] - pose.eye) * (self._zoom(size) * scale) + middle * (1 + 1j)
        apart = (-1, *[1] * (shape.ndim - 1))
        corners = pose.turn[:-1].reshape(apart) * shape
        corners += place.reshape(apart)
        fixed = np.rint(corners.view(np.float64) * (1 << SHIFT))
        return fixed.reshape(*corners.shape, 2).astype(np.int32)

    def picture(self, pose: Pose, size: int) -> NDArray[np.uint8]:
        """(S, S, 3) uint8 RGB."""
        moving = self._background
        large = self._scenery(size).behind(pose) if moving is None else moving.picture(pose.drift, SAMPLES * size)
        corners = self._corners(pose, size, SAMPLES, (SAMPLES - 1) / 2, SAMPLES_INSET)
        bands = None
        if self.look == "textured":
            bands = self._fixed(pose, size, SAMPLES, (SAMPLES - 1) / 2, self._bands(size))
        for k in self._order:
            cv2.fillConvexPoly(large, corners[k], self._colours[k], cv2.LINE_AA, SHIFT)
            if bands is not None:
                for band, colour in zip(bands[k], self._band_colours[k], strict=True):
                    cv2.fillConvexPoly(large, band, colour, cv2.LINE_AA, SHIFT)
        return np.asarray(cv2.resize(large, (size, size), interpolation=cv2.INTER_AREA), np.uint8)

    def codes(self, pose: Pose, size: int) -> NDArray[np.uint8]:
        """(S, S) codes of the parts at the centres of the pixels: 0 is the sky, k + 1 is part k. Kept in the pose; do not change it."""
        found = pose.seen.get(size)
        if found is None:
            large = self._scenery(size).codes.copy()
            corners = self._corners(pose, size, FINE, 0.0, FINE_INSET)
            for k in self._order:
                cv2.fillConvexPoly(large, corners[k], k + 1, cv2.LINE_8, SHIFT)
            found = pose.seen[size] = np.ascontiguousarray(large[::FINE, ::FINE])
        return found

    def flow(self, a: Pose, b: Pose, size: int) -> NDArray[np.float32]:
        """(S, S, 2) float32 motion from ``a`` to ``b`` of what the pixels of ``a`` show, x then y; exact. The sky does not move, a moving
        background does."""
        if a is b:
            return np.zeros((size, size, 2), np.float32)
        turned = b.turn * a.turn.conj()
        moved = self.in_pixels(b, size) - turned * self.in_pixels(a, size)
        # Codes start at the sky or the moving background.
        table = np.zeros((2, len(turned) + 1), np.complex64)
        table[0, 1:], table[1, 1:] = turned - 1, moved
        table[1, 0] = (b.drift - a.drift) * size
        codes = self.codes(a, size)
        field = table[0].take(codes)
        field *= self._scenery(size).pixels
        field += table[1].take(codes)
        return field.view(np.float32).reshape(size, size, 2)

    def _scenery(self, size: int) -> _Scenery:
        scene = self._scenes.get(size)
        if scene is None:
            floor = len(self.numbers) if self._background is None else 0  # a background covers the floor, too
            scene = self._scenes[size] = _Scenery(self.view, self._ground, size, floor)
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
        lowest = 2.0 * side  # of what can be seen; a body without a floor has none there
        horizon = -np.inf if view.above else min((view.middle + view.half - ground) * self._zoom, lowest)  # in drawn rows
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


_GROWN = 1e-4
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
    return (
        float(opacity) >= SOLID and int(model.geom_group[number]) < 3 and not (plane and (_is_floor(model, number) or not above))
    )


def _support(
    model: Any, kind: str, number: int, frame: NDArray[np.float64], away: NDArray[np.float64], grown: float = 0.0
) -> NDArray[np.float64]:
    """(N, 3) points of a convex shape farthest in (N, 3) directions, relative to its centre; ``frame`` (3, 3) has its axes as columns.
    The surface of the shape is ``grown`` outwards, metres."""
    shape = int(getattr(model, f"{kind}_type")[number])
    size = np.asarray(getattr(model, f"{kind}_size")[number], np.float64) + grown
    local = away @ frame
    sign = np.sign(np.round(local, 9))
    if shape == _SPHERE:
        points = size[0] * local
    elif shape == _CAPSULE:
        points = size[0] * local
        points[:, 2] += sign[:, 2] * (size[1] - grown)
    elif shape == _ELLIPSOID:
        points = size**2 * local / np.linalg.norm(size * local, axis=1, keepdims=True)
    elif shape == _CYLINDER:
        flat = local[:, :2]
        around = size[0] * flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-9)
        points = np.column_stack([around, sign[:, 2] * size[1]])
    elif shape == _BOX:
        points = sign * size
    elif shape == _PLANE:  # a wall
        points = sign * np.array([size[0], size[1], WALL + grown])
    else:
        raise EnvError(f"the planar drawing has no shape for {kind} {number} of type {shape}")
    return np.asarray(points @ frame.T, np.float64)


def _outline(model: Any, data: Any, kind: str, number: int, above: bool) -> NDArray[np.complex128]:
    """(2, CORNERS) corners of a part's outline in the plane, in order, and where each goes if the outline grows by one metre."""
    frame = np.asarray(getattr(data, f"{kind}_xmat")[number], np.float64).reshape(3, 3)
    up = 1 if above else 2
    # Directions start half a corner off the part's own axis, so that the two ends of a capsule get equally many.
    column = int(_steady_columns(frame.reshape(1, 9), np.array([0, up]))[0])
    start = np.arctan2(frame[up, column], frame[0, column])
    angle = start + 2 * np.pi * (np.arange(CORNERS) + 0.5) / CORNERS
    directions = np.zeros((CORNERS, 3))
    directions[:, 0], directions[:, up] = np.cos(angle), np.sin(angle)
    points, grown = (_support(model, kind, number, frame, directions, by) for by in (0.0, _GROWN))
    both = np.stack([points + getattr(data, f"{kind}_xpos")[number], (grown - points) / _GROWN])
    return both[..., 0] - 1j * both[..., up]


def _band(outline: NDArray[np.complex128], first: float, last: float, inset: float) -> NDArray[np.complex128]:
    """(BAND_CORNERS,) the part of a convex outline between two shares of its length, ``inset`` from the cuts."""
    turned = np.ptp(outline.imag) > np.ptp(outline.real)
    along = outline * -1j if turned else outline
    start, length = along.real.min(), np.ptp(along.real)
    low = start + first * length + inset
    cuts = np.linspace(low, max(start + last * length - inset, low), BAND_CORNERS // 2)
    # The two sides of the outline between its ends, each with growing length.
    side = along.imag > np.interp(along.real, along.real[_ends(along)], along.imag[_ends(along)])
    sides = []
    for chain in (along[side], along[~side]):
        chain = np.append(chain, along[_ends(along)])
        chain = chain[np.argsort(chain.real, kind="stable")]
        sides.append(cuts + 1j * np.interp(cuts, chain.real, chain.imag))
    band = np.concatenate([sides[0], sides[1][::-1]])
    return np.asarray(band * 1j if turned else band)


def _ends(outline: NDArray[np.complex128]) -> list[int]:
    return [int(outline.real.argmin()), int(outline.real.argmax())]


def _thickness(model: Any, data: Any, kind: str, number: int, away: NDArray[np.float64]) -> float:
    """Half a part's extent towards the viewer."""
    frame = np.asarray(getattr(data, f"{kind}_xmat")[number], np.float64).reshape(3, 3)
    return float(_support(model, kind, number, frame, away[None])[0] @ away)


def _steady_columns(frames: NDArray[np.float64], rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """(N,) for each of (N, 9) rotation matrices, the first of its axes that lies in the plane; it stays there when the part moves."""
    flat = np.asarray(frames, np.float64).reshape(-1, 3, 3)[:, rows]
    return np.argmax(np.round(np.linalg.norm(flat, axis=1), 3), axis=1)


def _colours(
    model: Any, parts: list[tuple[str, int]], owner: NDArray[np.uint8], far: list[bool]
) -> list[tuple[float, float, float]]:
    """Colours of the parts: the agent's from `COLOURS` in turn, darker if ``far``."""
    result, used = [], 0
    for k, (kind, number) in enumerate(parts):
        material = int(model.geom_matid[number] if kind == "geom" else model.site_matid[number])
        name = model.material(material).name if material >= 0 else ""
        colour: tuple[int, int, int] = DECORATION
        if owner[k] == OTHER:
            colour = TARGET
        elif kind == "site" and owner[k] == AGENT:
            colour = TARGET  # the point of the agent that has to reach the target
        elif owner[k] == AGENT and name != "decoration":
            colour = COLOURS[used % len(COLOURS)]
            used += 1
        light = FAR if far[k] and owner[k] == AGENT else 1.0
        result.append((light * colour[0], light * colour[1], light * colour[2]))
    return result
