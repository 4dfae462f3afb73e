"""The tasks of generated planar trees (`localmotion.envs.planar_trees`) for dm_control. Importing this imports MuJoCo."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np
from dm_control import mujoco
from dm_control.rl import control
from dm_control.suite import base
from dm_control.utils import rewards

from localmotion.envs.planar_trees import mjcf, tree

CONTROL_STEP = 0.025
"""Seconds of an env step. A physics step takes 0.005."""
SETTLING = 400
"""Physics steps in which a body comes to rest before an episode of ``run``; dm_control's cheetah has 200."""

TARGET, TIP = 1, 0
"""Numbers of the target among the geoms (after the floor) and of the arm's end among the sites."""


class Run(base.Task):
    """Move forward. The reward grows linearly with the horizontal speed of the centre of mass, from 0 at rest to 1 at the body's speed,
    like that of dm_control's cheetah. The body may fall and go on."""

    def initialize_episode(self, physics: Any) -> None:
        """Hinges in the middle half of their ranges, the root within 30 degrees of its rest; then it falls and settles."""
        model, data = physics.model, physics.data
        limited = model.jnt_limited == 1
        low, high = model.jnt_range[limited].T
        data.qpos[limited] = (low + high) / 2 + (high - low) / 4 * self.random.uniform(-1, 1, limited.sum())
        data.qpos[2] = self.random.uniform(-np.pi / 6, np.pi / 6)
        physics.forward()
        data.qpos[1] -= lowest(physics) - 0.01
        physics.step(nstep=SETTLING)
        data.time = 0
        super().initialize_episode(physics)

    def get_observation(self, physics: Any) -> OrderedDict[str, Any]:
        """Orientations of the links, height of the root, velocities: dm_control's walker's."""
        seen = OrderedDict[str, Any]()
        seen["orientations"] = physics.data.xmat[1:, [0, 2]].ravel()
        seen["height"] = physics.data.xipos[1, 2]
        seen["velocity"] = physics.velocity()
        return seen

    def get_reward(self, physics: Any) -> float:
        """In 0..1."""
        wanted = float(physics.model.numeric_data[0])
        speed = physics.data.sensordata[0]
        return float(rewards.tolerance(speed, bounds=(wanted, np.inf), margin=wanted, value_at_margin=0, sigmoid="linear"))


class Reach(base.Task):
    """Hold the end of the longest chain in the target: the reward is 1 there and 0 elsewhere, like dm_control's reacher.

    solution  (nq,) the position of the hinges from which the target was drawn
    """

    solution: Any

    def initialize_episode(self, physics: Any) -> None:
        """The target is where the chain's end is in one random position of the hinges, so it can be reached; the body begins in another."""
        self._pose(physics)
        self.solution = physics.data.qpos.copy()
        physics.model.geom_pos[TARGET, :2] = physics.data.site_xpos[TIP, :2]
        for _ in range(20):
            self._pose(physics)
            if np.linalg.norm(self._to_target(physics)) > 3 * physics.model.geom_size[TARGET, 0]:
                break
        super().initialize_episode(physics)

    def _pose(self, physics: Any) -> None:
        model = physics.model
        limited = model.jnt_limited == 1
        low, high = np.where(limited, model.jnt_range.T, [[-np.pi], [np.pi]])
        physics.data.qpos[:] = self.random.uniform(low, high)
        physics.forward()

    def _to_target(self, physics: Any) -> Any:
        return physics.data.geom_xpos[TARGET, :2] - physics.data.site_xpos[TIP, :2]

    def get_observation(self, physics: Any) -> OrderedDict[str, Any]:
        """Angles, the way to the target, velocities: dm_control's reacher's."""
        seen = OrderedDict[str, Any]()
        seen["position"] = physics.position()
        seen["to_target"] = self._to_target(physics)
        seen["velocity"] = physics.velocity()
        return seen

    def get_reward(self, physics: Any) -> float:
        """0 or 1."""
        near = physics.model.geom_size[TARGET, 0] + physics.model.site_size[TIP, 0]
        return float(np.linalg.norm(self._to_target(physics)) <= near)


def load(number: int, kind: str) -> control.Environment:
    """A body's task, "run" or "reach"."""
    physics = mujoco.Physics.from_xml_string(mjcf(tree(number), kind))
    task = {"run": Run, "reach": Reach}[kind](random=0)
    return control.Environment(physics, task, control_timestep=CONTROL_STEP)


def lowest(physics: Any) -> float:
    """Height of the lowest point of the links, metres."""
    model, data = physics.model, physics.data
    links = model.geom_bodyid > 0
    half, radius = model.geom_size[links, 1], model.geom_size[links, 0]
    return float((data.geom_xpos[links, 2] - half * np.abs(data.geom_xmat[links, 8]) - radius).min())
