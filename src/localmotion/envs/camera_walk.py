"""The camera of the Distracting Control Suite: a random walk on part of a sphere, looking at the same point as the task's own camera.

Source: Stone et al. 2021, section 3; constants of the suite's difficulty levels. The pose is written into mujoco.MjData after every
env step: the physics recomputes the camera there, and only rendering reads it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

OVERHEAD = 0.3
"""Cameras within this angle (radians) of straight above are not limited in direction and turn the shortest way, as for the suite's
reacher."""
_FIXED = 0  # mjCAMLIGHT_FIXED


class CameraWalk:
    """One episode's walk; making it draws the start and sets the first pose.

    Args:
        model, data: mujoco.MjModel and mujoco.MjData, with the camera's current own pose.
        camera: its number.
        scale: s of the difficulty, 0..1. Angles may leave the start by pi/2 s, the distance by -0.5 s to +1.5 s of it.
        rng: draws start and steps.
        dynamic: False: the start pose stays (relative to a tracked body).
        domain: of the task; reacher's camera may go anywhere.
    """

    def __init__(
        self, model: Any, data: Any, camera: int, scale: float, rng: np.random.Generator, *, dynamic: bool, domain: str
    ) -> None:
        self._data, self._camera, self._rng = data, camera, rng
        self._tracks = int(model.cam_mode[camera]) != _FIXED
        self._look = self._own_look()
        start = data.cam_xpos[camera] - (data.subtree_com[1] if self._tracks else 0.0)
        radius, around, down = to_sphere(start)
        self._level = domain != "reacher" and down > OVERHEAD
        reach = np.pi / 2 * scale
        low = np.array([radius * (1 - 0.5 * scale), around - reach, down - reach])
        high = np.array([radius * (1 + 1.5 * scale), around + reach, down + reach])
        if self._level:  # stay above the ground and, where the own camera is there, on the side of negative y
            low[2], high[2] = max(low[2], 0.0), min(high[2], max(np.pi / 2, down))
            if -np.pi <= around <= 0:
                low[1], high[1] = max(low[1], -np.pi), min(high[1], 0.0)
        self._low, self._high, self._roll_limit = low, high, reach
        self._place = np.array([rng.uniform(*side) for side in zip(low[[1, 2, 0]], high[[1, 2, 0]], strict=True)])[[2, 0, 1]]
        self._roll = float(rng.uniform(-reach, reach))
        # Speeds of the suite are for cameras four units away.
        moving, pace = float(dynamic), radius / 4
        self._std, self._top = 0.1 * scale * pace * moving, 0.4 * scale * pace * moving
        self._roll_std, self._roll_top = np.pi / 300 * scale * moving, np.pi / 50 * scale * moving
        heading = rng.standard_normal(3)
        self._velocity = heading / np.linalg.norm(heading) * rng.uniform(0, 0.4 * scale * moving)
        self._roll_velocity = float(rng.uniform(-self._roll_top, self._roll_top))
        self.advance()

    def _own_look(self) -> NDArray[np.float64]:
        """The point that the model's camera looks at, at the distance of the body."""
        eye, axes = self._data.cam_xpos[self._camera], self._data.cam_xmat[self._camera].reshape(3, 3)
        return np.asarray(eye - axes[:, 2] * np.linalg.norm(eye - self._data.subtree_com[1]))

    def advance(self) -> None:
        """Advance by one env step: after the physics has reset the camera to its own pose, move it to the walk's pose."""
        self._velocity = self._velocity + self._std * self._rng.standard_normal(3)
        speed = float(np.linalg.norm(self._velocity))
        if speed > self._top:
            self._velocity = self._velocity * (self._top / speed)
        before = from_sphere(self._place)
        self._place = np.clip(to_sphere(before + self._velocity), self._low, self._high)
        after = from_sphere(self._place)
        self._velocity = after - before
        wanted = self._roll_velocity + self._roll_std * float(self._rng.standard_normal())
        roll = self._roll + float(np.clip(wanted, -self._roll_top, self._roll_top))
        roll = float(np.clip(roll, -self._roll_limit, self._roll_limit))
        self._roll_velocity, self._roll = roll - self._roll, roll
        self.aim()

    def aim(self) -> None:
        """After the physics has reset the camera to its own pose, move it to the walk's present pose."""
        eye, look = from_sphere(self._place), self._look
        if self._tracks:
            eye, look = eye + self._data.subtree_com[1], self._own_look()
        axes = looking(eye, look, level=self._level)
        c, s = np.cos(self._roll), np.sin(self._roll)
        axes = axes @ np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
        self._data.cam_xpos[self._camera] = eye
        self._data.cam_xmat[self._camera] = axes.reshape(9)


def to_sphere(vector: NDArray[np.float64]) -> NDArray[np.float64]:
    """(3,) x, y, z as radius, angle about z from x, angle from z."""
    x, y, z = vector
    return np.array([np.linalg.norm(vector), np.arctan2(y, x), np.arctan2(np.hypot(x, y), z)])


def from_sphere(place: NDArray[np.float64]) -> NDArray[np.float64]:
    """Inverse of `to_sphere`."""
    radius, around, down = place
    return np.asarray(radius * np.array([np.sin(down) * np.cos(around), np.sin(down) * np.sin(around), np.cos(down)]))


def looking(eye: NDArray[np.float64], look: NDArray[np.float64], *, level: bool) -> NDArray[np.float64]:
    """(3, 3) of a camera at ``eye`` that looks at ``look``, columns right, up, back.

    level: the horizon is level. Otherwise a camera that looks down with y up is turned the shortest way, which has no jump straight above.
    """
    ahead = (look - eye) / max(float(np.linalg.norm(look - eye)), 1e-9)
    if level:
        right = np.cross(ahead, [0.0, 0.0, 1.0])
        right /= max(float(np.linalg.norm(right)), 1e-9)
        return np.stack([right, np.cross(right, ahead), -ahead], axis=1)
    down = np.array([0.0, 0.0, -1.0])
    axis = np.cross(down, ahead)
    sine, cosine = float(np.linalg.norm(axis)), float(down @ ahead)
    if sine < 1e-9:
        return np.eye(3) if cosine > 0 else np.diag([1.0, -1.0, -1.0])
    x, y, z = axis / sine
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.asarray(np.eye(3) + sine * cross + (1 - cosine) * cross @ cross)
