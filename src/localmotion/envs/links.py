"""The places of the agent's links in the picture, for probes (docs/studies.md).

A link is a body of the agent that has a geom. Its place is that of its centre of mass: x, y in pixels of the picture, the centre of the
top-left pixel is (0, 0). A link outside the picture, or behind something, has a place like any other. The velocity of a link in the picture
is the difference of its places in two pictures, so it contains the motion of the camera, like optical flow.

The angle of a link is how far it is turned in the picture from its orientation in the model's reference pose, in radians from -pi to pi;
positive angles turn x towards y. It is exact if the link turns in the plane of the picture. For other rotations it is the part about the
line of sight (the twist of the swing-twist decomposition).
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localmotion.envs.masks import AGENT, AgentParts
from localmotion.errors import EnvError


class Links:
    """The L links of an agent in a MuJoCo model.

    Args:
        model: mujoco.MjModel.
        parts: which of its geoms are the agent's.
        view: (3, 3) reference rotation from the world to x right, y down, z forward of the picture.

    Attributes:
        bodies: (L,) int64, numbers of their bodies.
        names: L names.
    """

    def __init__(self, model: Any, parts: AgentParts, view: NDArray[np.float64]) -> None:
        import mujoco

        self.bodies = np.unique(np.asarray(model.geom_bodyid)[parts.geoms == AGENT]).astype(np.int64)
        self.names = tuple(model.body(int(body)).name for body in self.bodies)
        data = mujoco.MjData(model)  # in the reference pose
        mujoco.mj_kinematics(model, data)
        turns = np.array(data.xmat, np.float64)[self.bodies].reshape(-1, 3, 3)
        self._back = np.einsum("nji,kj->nik", turns, view)  # R^T V^T, (L, 3, 3)

    def centres(self, data: Any) -> NDArray[np.float64]:
        """(L, 3) centres of mass in the world, in mujoco.MjData ``data``."""
        return np.array(data.xipos, np.float64)[self.bodies]

    def angles(self, data: Any, view: NDArray[np.float64]) -> NDArray[np.float64]:
        """(L,) angles in a picture with rotation ``view`` (3, 3) from the world."""
        turned = view @ np.array(data.xmat, np.float64)[self.bodies].reshape(-1, 3, 3) @ self._back  # (L, 3, 3)
        return np.arctan2(turned[:, 1, 0] - turned[:, 0, 1], turned[:, 0, 0] + turned[:, 1, 1])


class CameraLinks:
    """Links of an environment whose pictures are those of a camera of its MuJoCo model. For subclasses of `PixelEnv`."""

    name: str
    draw_size: int
    camera: int
    _begun: bool
    _renderer: Any

    def _linked(self) -> tuple[Any, Any, AgentParts]:
        """mujoco.MjModel, mujoco.MjData, and which geoms are the agent's."""
        raise NotImplementedError

    @cached_property
    def _links(self) -> Links:
        model, _, parts = self._linked()
        axes = np.array(model.cam_mat0[self.camera], np.float64).reshape(3, 3)  # columns right, up, back
        return Links(model, parts, axes.T * np.array([[1.0], [-1.0], [-1.0]]))

    @property
    def link_names(self) -> tuple[str, ...]:
        """Names of the agent's links."""
        return self._links.names

    def link_places(self, size: int | None = None) -> NDArray[np.float64]:
        """(L, 3) x, y in pixels and angle of the agent's links in the current picture, NaN for x and y behind the camera. The side of the
        picture is ``size`` or that of the drawing.

        Raises:
            EnvError: before the first reset; an orthographic camera.
        """
        if not self._begun:
            raise EnvError(f"{self.name}: call reset() before link_places()")
        import mujoco

        from localmotion.envs.truth_mujoco import scene_camera

        model, data, _ = self._linked()
        scene = self._renderer._scene
        mujoco.mjv_updateCamera(model, data, self._renderer.camera, scene)
        camera = scene_camera(scene, size or self.draw_size, self._renderer._upside_down, self.name)
        points, _ = camera.project(self._links.centres(data) - camera.position)
        return np.column_stack([points, self._links.angles(data, camera.rotation)])
