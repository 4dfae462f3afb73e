"""DeepMind Control suite (dm_control 1.0.28) by task name, with the papers' protocol: action repeat 2, 1000 env steps, camera 0."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from localmotion.envs.control import ACTION_REPEAT, TASKS, TIME_LIMIT, ControlEnv
from localmotion.envs.links import CameraLinks
from localmotion.errors import EnvError, unknown_name

if TYPE_CHECKING:
    from localmotion.envs.masks import AgentParts

__all__ = ["ACTION_REPEAT", "CAMERAS", "TASKS", "TIME_LIMIT", "DMCEnv"]

CAMERAS: dict[str, int | str] = {"quadruped": 2, "dog_fetch": "y-axis"}
"""Cameras of domains or tasks that do not use number 0, which in dog fetch shows only the ball."""


class DMCEnv(CameraLinks, ControlEnv):
    """One task of the suite drawn by MuJoCo. Suites that render the same tasks differently are subclasses."""

    suite_name: ClassVar[str] = "dmc"

    def __init__(
        self,
        task: str,
        *,
        seed: int = 0,
        size: int = 64,
        percept_size: int | None = None,
        action_repeat: int | None = None,
        time_limit: int | None = None,
        quality: str = "auto",
        camera: str | int | None = None,
    ) -> None:
        if task not in TASKS:
            raise unknown_name("DMC task", task, TASKS)
        from localmotion.envs.gl import choose_gl

        self._gl = choose_gl()  # before dm_control, whose import fixes how MuJoCo draws
        from localmotion.envs.render import SceneRenderer, camera_id, resolve_quality

        super().__init__(
            task, seed=seed, size=size, percept_size=percept_size, action_repeat=action_repeat, time_limit=time_limit
        )
        model = self.physics.model.ptr
        domain = TASKS[task][0]
        self.camera = camera_id(model, CAMERAS.get(task, CAMERAS.get(domain, 0)) if camera is None else camera, self.name)
        self.quality = resolve_quality(quality)
        self._prepare(model)
        self._renderer = SceneRenderer(model, size=self.draw_size, camera=self.camera, quality=self.quality)

    def _prepare(self, model: Any) -> None:
        """Called once, before the renderer is made. A subclass may change the look of mujoco.MjModel ``model``."""

    def _begin(self, episode_seed: int) -> None:
        super()._begin(episode_seed)
        self._renderer.upload_height_fields()

    def _draw(self, size: int) -> NDArray[np.uint8]:
        return self._renderer.frame(self.physics.data.ptr, size)

    def agent_mask(self, size: int | None = None) -> NDArray[np.bool_]:
        """(S, S) pixels that show the agent, by MuJoCo's segmentation (`localmotion.envs.masks`); S is ``size`` or that of the drawing.

        Raises:
            EnvError: before the first reset.
        """
        if not self._begun:
            raise EnvError(f"{self.name}: call reset() before agent_mask()")
        from localmotion.envs.masks import moving_parts, segment

        model = self.physics.model.ptr
        return segment(self._renderer, model, self.physics.data.ptr, moving_parts(model), size).agent

    def _linked(self) -> tuple[Any, Any, AgentParts]:
        from localmotion.envs.masks import moving_parts

        return self.physics.model.ptr, self.physics.data.ptr, moving_parts(self.physics.model.ptr)

    def _facts(self) -> dict[str, Any]:
        return {"camera": self.camera, "quality": self.quality, "gl": self._gl.to_json(), **super()._facts()}

    def close(self) -> None:
        """Free the renderer."""
        self._renderer.close()
