"""An environment of one's own: two lamps, one of them lit. Pressing the button on its side gives reward 1 (docs/own_environments.md)."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces


class Lamps(gymnasium.Env[dict[str, Any], int]):
    """Pictures of two lamps, two buttons, and an episode of ``presses`` presses. After each press another lamp may be lit."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, presses: int = 10) -> None:
        self.presses, self.render_mode = presses, "rgb_array"
        picture = spaces.Box(0, 255, (48, 64, 3), np.uint8)
        self.observation_space = spaces.Dict({"image": picture, "left": spaces.Box(0, presses, (1,), np.float32)})
        self.action_space = spaces.Discrete(2)  # left button, right button

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
        super().reset(seed=seed)  # seeds self.np_random, from which everything random comes
        self.left, self.right_presses = self.presses, 0
        self.lit = int(self.np_random.integers(2))
        return self._observation(), {}

    def step(self, action: int) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        reward = float(action == self.lit)
        self.left, self.right_presses = self.left - 1, self.right_presses + int(reward)
        self.lit = int(self.np_random.integers(2))
        truncated = self.left == 0  # a limit, not an end of the task: terminated stays False
        info = {"success": self.right_presses == self.presses} if truncated else {}
        return self._observation(), reward, False, truncated, info

    def _observation(self) -> dict[str, Any]:
        return {"image": self.render(), "left": np.array([self.left], np.float32)}

    def render(self) -> np.ndarray:
        picture = np.full((48, 64, 3), 40, np.uint8)
        side = 32 * self.lit
        picture[12:36, side + 4 : side + 28] = (250, 200, 40)
        return picture
