"""Change the look of a compiled MuJoCo model in place: textures, cameras and lamps, without any effect on the physics.

A new texture overwrites the bytes of one of the model's and is sent to OpenGL again; it may be smaller than the old one. The result
equals a model built with the new picture (bit for bit, see tests/test_envs_dmcr.py), in a fraction of the time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from localmotion.errors import ConfigError, unknown_name


class TextureSlot:
    """One texture of a model, filled with square pictures of ``side`` pixels; a sky shows its picture on all six sides.

    Make it before the renderer's context, which takes the texture's size at that time.

    Args:
        model: mujoco.MjModel.
        index: number of the texture.
        side: pixels; must fit into the texture that the model was built with.
    """

    def __init__(self, model: Any, index: int, side: int) -> None:
        room = int(model.tex_width[index]) * int(model.tex_height[index]) * int(model.tex_nchannel[index])
        if side * side * 3 > room:
            raise ConfigError(f"a texture of {side} pixels does not fit into the {room} bytes of texture {index}")
        self._model, self.index, self.side = model, index, side
        model.tex_width[index] = model.tex_height[index] = side
        model.tex_nchannel[index] = 3
        start = int(model.tex_adr[index])
        self._place = slice(start, start + side * side * 3)
        self._shown: NDArray[np.uint8] | None = None

    def write(self, picture: NDArray[np.uint8]) -> bool:
        """Put in a picture (H, W, 3) uint8, scaled to the slot; True if it has to be sent to OpenGL, i.e. it is another array than
        before."""
        if picture is self._shown:
            return False
        self._shown = picture
        if picture.shape[:2] != (self.side, self.side):
            picture = np.asarray(cv2.resize(picture, (self.side, self.side), interpolation=cv2.INTER_AREA), np.uint8)
        self._model.tex_data[self._place] = picture.reshape(-1)
        return True


SHOWN_GROUPS = 3
"""MuJoCo draws geoms, sites, tendons and skins of the groups below this number."""


def drawn_materials(model: Any) -> NDArray[np.int64]:
    """Numbers of the materials whose colour a part of the scene has, sorted, (M,). ``model``: mujoco.MjModel.

    A part has the colour of its material unless it has one of its own, that is one other than MuJoCo's default grey.
    """
    found: set[int] = set()
    for kind in ("geom", "site", "tendon", "skin"):
        material, colour, group = (np.asarray(getattr(model, f"{kind}_{name}")) for name in ("matid", "rgba", "group"))
        plain = (colour.reshape(-1, 4) == np.array([0.5, 0.5, 0.5, 1], np.float32)).all(1)
        found |= set(material[(material >= 0) & plain & (group < SHOWN_GROUPS)].tolist())
    return np.array([i for i in sorted(found) if model.mat_rgba[i, 3] > 0], np.int64)


class SkyStream:
    """Sends a sky of changing pictures to OpenGL: takes a fifth of the time of MuJoCo's upload, which allocates the texture each time.

    Only the largest mipmap level is sent and used, because a sky is drawn at about its stored size.

    Args:
        renderer: the `SceneRenderer`, made after the slot.
        slot: of the sky.
    """

    def __init__(self, renderer: Any, slot: TextureSlot) -> None:
        from OpenGL import GL  # type: ignore[import-untyped]

        self._gl, self._renderer, self._slot = GL, renderer, slot
        renderer._enter()
        GL.glBindTexture(GL.GL_TEXTURE_CUBE_MAP, self._name())
        GL.glTexParameteri(GL.GL_TEXTURE_CUBE_MAP, GL.GL_TEXTURE_MIN_FILTER, GL.GL_LINEAR)
        GL.glBindTexture(GL.GL_TEXTURE_CUBE_MAP, 0)

    def _name(self) -> int:
        return int(self._renderer._context.texture[self._slot.index])

    def show(self, picture: NDArray[np.uint8]) -> None:
        """Put ``picture`` (S, S, 3) uint8, S the slot's side, on all six sides of the sky."""
        self._slot.write(picture)
        GL, side = self._gl, self._slot.side
        self._renderer._enter()
        GL.glBindTexture(GL.GL_TEXTURE_CUBE_MAP, self._name())
        GL.glPixelStorei(GL.GL_UNPACK_ALIGNMENT, 1)
        for face in range(6):
            place = GL.GL_TEXTURE_CUBE_MAP_POSITIVE_X + face
            GL.glTexSubImage2D(place, 0, 0, 0, side, side, GL.GL_RGB, GL.GL_UNSIGNED_BYTE, picture)
        GL.glBindTexture(GL.GL_TEXTURE_CUBE_MAP, 0)


def sky_texture(model: Any) -> int | None:
    """Number of the model's sky texture, or None."""
    found = np.flatnonzero(np.asarray(model.tex_type) == 2)  # mjTEXTURE_SKYBOX
    return int(found[0]) if len(found) else None


def named(model: Any, kind: str, name: str) -> int | None:
    """Number of the ``kind`` ("texture", "material", "light", ...) called ``name``, or None."""
    counts = {"texture": model.ntex, "material": model.nmat, "light": model.nlight, "geom": model.ngeom}
    return next((i for i in range(counts[kind]) if getattr(model, kind)(i).name == name), None)


class Mount:
    """A camera or lamp of a compiled model that can be moved within its body.

    MuJoCo stores the pose three times: in the body's frame and, if it tracks a body, relative to the body and to its centre of mass in the
    model's first pose. All three are set, as the model compiler does.

    Args:
        model: mujoco.MjModel.
        kind: "cam" or "light".
        index: number of the camera or lamp.
    """

    def __init__(self, model: Any, kind: str, index: int) -> None:
        import mujoco

        data = mujoco.MjData(model)
        mujoco.mj_kinematics(model, data)
        mujoco.mj_comPos(model, data)
        body = int(getattr(model, f"{kind}_bodyid")[index])
        self._mujoco, self._model, self._kind, self._index = mujoco, model, kind, index
        self._body, self._rotation = data.xpos[body].copy(), data.xmat[body].reshape(3, 3).copy()
        self._centre = data.subtree_com[body].copy()
        self.position: NDArray[np.float64] = np.array(getattr(model, f"{kind}_pos")[index])
        self._first = [(name, np.array(getattr(model, name)[index])) for name in self._fields()]

    def _fields(self) -> list[str]:
        names = [f"{self._kind}_pos", f"{self._kind}_pos0", f"{self._kind}_poscom0"]
        return [*names, "cam_quat", "cam_mat0"] if self._kind == "cam" else names

    def restore(self) -> None:
        """Restore the pose of the built model."""
        for name, value in self._first:
            getattr(self._model, name)[self._index] = value

    def place(self, position: Sequence[float] | NDArray[np.float64], rotation: NDArray[np.float64] | None = None) -> None:
        """Move to ``position`` (3,) in the body's frame and turn a camera to ``rotation`` (3, 3), columns right, up, back; None:
        unchanged."""
        model, index, kind = self._model, self._index, self._kind
        world = self._body + self._rotation @ np.asarray(position, np.float64)
        getattr(model, f"{kind}_pos")[index] = position
        getattr(model, f"{kind}_pos0")[index] = world - self._body
        getattr(model, f"{kind}_poscom0")[index] = world - self._centre
        if rotation is not None:
            quaternion = np.empty(4)
            self._mujoco.mju_mat2Quat(quaternion, np.ascontiguousarray(rotation, np.float64).reshape(9))
            model.cam_quat[index] = quaternion
            model.cam_mat0[index] = (self._rotation @ rotation).reshape(9)


def euler_rotation(degrees: Sequence[float]) -> NDArray[np.float64]:
    """(3, 3) of MuJoCo's default Euler angles: rotations about the moving x, then y, then z axis."""
    turned = np.eye(3)
    for axis, angle in enumerate(np.radians(degrees)):
        turned = turned @ turn(axis, float(angle))
    return turned


def turn(axis: int, angle: float) -> NDArray[np.float64]:
    """(3, 3) right-handed rotation about a coordinate axis by ``angle`` radians."""
    c, s = np.cos(angle), np.sin(angle)
    matrix = np.eye(3)
    first, second = [(1, 2), (2, 0), (0, 1)][axis]
    matrix[first, first] = matrix[second, second] = c
    matrix[first, second], matrix[second, first] = -s, s
    return matrix


def chosen(kind: str, given: str | Iterable[str], known: Sequence[str]) -> tuple[str, ...]:
    """Names given as a list, or as text with commas (also "all" and "none"), in the order of ``known``. Raises ConfigError for others."""
    if isinstance(given, str):
        given = list(known) if given == "all" else [] if given in ("none", "") else given.split(",")
    names = [str(name).strip() for name in given]
    for name in names:
        if name not in known:
            raise unknown_name(kind, name, known)
    return tuple(name for name in known if name in names)


def in_range(label: str, value: Any, low: float, high: float, whole: bool = False) -> float:
    """The number as float. Raises ConfigError if it is not a number, not finite, not an integer if required, or outside low..high."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise ConfigError(f"{label}={value!r} must be a number in {low:g}..{high:g}")
    if not low <= value <= high or (whole and value != int(value)):  # NaN fails the comparison
        raise ConfigError(f"{label}={value!r} must be {'a whole number' if whole else 'a number'} in {low:g}..{high:g}")
    return float(value)
