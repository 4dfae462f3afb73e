"""A robot for the example of docs/robot_logs.md: an arm moves a block on a table; a camera looks down on it.

The simulation is `toy:block`. To use a robot of your own, write a class with these three members.
"""

from __future__ import annotations

import numpy as np

from localmotion.envs import make_env

FPS = 10
MAX_SPEED = 500.0
"""Largest speed on each axis, mm/s. The block's centre moves within a square with sides of 500 mm."""
STEPS = 50
"""Commands of an episode."""


class Robot:
    """One episode is `start`, then `STEPS` times `send`."""

    def __init__(self) -> None:
        self._env = make_env("toy:block", size=96, time_limit=STEPS)
        self.position = np.zeros(2)
        """The block's centre, (x, y) in mm."""

    def start(self, seed: int) -> np.ndarray:
        """Put the block somewhere. The camera's picture, (96, 96, 3) uint8 RGB."""
        obs, _ = self._env.reset(seed=seed)
        self.position = 500 * self._env.agent
        return obs["image"]

    def send(self, command: np.ndarray) -> tuple[np.ndarray, float]:
        """Move with ``command``, (2,) mm/s, for a tenth of a second. The next picture, and the reward: 1 in the middle of the table."""
        action = np.clip(command / MAX_SPEED, -1, 1).astype(np.float32)
        obs, reward, *_ = self._env.step(action)
        self.position = 500 * self._env.agent
        return obs["image"], float(reward)
