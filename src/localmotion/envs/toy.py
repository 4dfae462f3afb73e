"""Exact little environments without MuJoCo, for learning smoke tests, continuous integration and teaching."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localmotion.envs.base import PixelEnv
from localmotion.errors import ConfigError, unknown_name

TASKS = ("dot",)
SPEED = 0.06
"""Arena widths per env step at full action."""
PATCH = 1 / 8
"""Side of the agent's and the goal's patch in arena widths."""
TEXTURES = 8
ACTION_REPEAT, TIME_LIMIT = 1, 50
RANDOM_RETURN, OPTIMAL_RETURN = 23.5, 47.8
"""Mean return of uniform random actions and of `optimal_action`, 2,000 episodes of the default length each."""


def make_toy(task: str, *, camera: str | int | None = None, quality: str = "auto", **settings: Any) -> DotEnv:
    """The toy environment ``task``. Raises ConfigError for an unknown one, or a camera, which toys do not have."""
    if task not in TASKS:
        raise unknown_name("toy environment", task, TASKS)
    if camera is not None:
        raise ConfigError(f"camera={camera!r}: toy environments have no cameras; leave it out")
    from localmotion.envs.render import QUALITIES

    if quality not in QUALITIES:
        raise unknown_name("rendering quality", quality, QUALITIES)
    return DotEnv(**settings)


class DotEnv(PixelEnv):
    """A patch moved by a 2-d velocity (x right, y down) over a textured background to a goal patch.

    The agent's position lives in [0, 1]^2 and stops at the walls. Reward of an env step: max(0, 1 - distance to the goal) in
    arena widths, in 0..1; never terminated. Agent, goal and background texture are drawn at every reset. Agent and goal are at
    whole pixels, so the motion of the agent's patch between two pictures is exact: ``true_motion``.
    """

    def __init__(
        self,
        *,
        seed: int = 0,
        size: int = 64,
        percept_size: int | None = None,
        action_repeat: int | None = None,
        time_limit: int | None = None,
    ) -> None:
        super().__init__(
            "toy:dot",
            seed=seed,
            size=size,
            percept_size=percept_size,
            action_dim=2,
            action_repeat=ACTION_REPEAT if action_repeat is None else action_repeat,
            time_limit=TIME_LIMIT if time_limit is None else time_limit,
        )
        self.agent = self.goal = np.zeros(2)  # (x, y) of the centres' range, in [0, 1]
        self._before = self.agent
        self._texture = 0

    def _begin(self, episode_seed: int) -> None:
        rng = np.random.default_rng(episode_seed)
        self.agent, self.goal = rng.uniform(0, 1, 2), rng.uniform(0, 1, 2)
        self._texture = int(rng.integers(TEXTURES))
        self._before = self.agent

    def step(self, action: NDArray[np.float32]) -> Any:
        """As `PixelEnv.step`; also remembers where the agent was, for ``true_motion``."""
        self._before = self.agent
        return super().step(action)

    def _control(self, action: NDArray[np.float64]) -> tuple[float, bool]:
        self.agent = np.minimum(np.maximum(self.agent + SPEED * action, 0.0), 1.0)
        x, y = self.goal - self.agent
        return max(0.0, 1.0 - float(np.hypot(x, y))), False

    def true_motion(self) -> NDArray[np.float32]:
        """(x, y) displacement of the agent's patch in the last ``step``, pixels of ``image``; zeros after a reset. Exact."""
        moved = self._corner(self.agent, self.draw_size) - self._corner(self._before, self.draw_size)
        return (moved * (self.size / self.draw_size)).astype(np.float32)

    def agent_box(self) -> tuple[int, int, int, int]:
        """Left, top, right, bottom (exclusive) of the agent's patch in the drawn picture, pixels of ``draw_size``."""
        x, y = (int(v) for v in self._corner(self.agent, self.draw_size))
        side = _side(self.draw_size)
        return x, y, x + side, y + side

    def state(self) -> NDArray[np.float64]:
        """Agent, goal and texture number."""
        return np.array([*self.agent, *self.goal, self._texture])

    @staticmethod
    def _corner(position: NDArray[np.float64], size: int) -> NDArray[np.int64]:
        return np.rint(position * (size - _side(size))).astype(np.int64)

    def _draw(self, size: int) -> NDArray[np.uint8]:
        backgrounds, agent, goal = _art(size)
        picture = backgrounds[self._texture].copy()
        side = _side(size)
        for position, patch in ((self.goal, goal), (self.agent, agent)):
            x, y = self._corner(position, size)
            picture[y : y + side, x : x + side] = patch
        return picture

    def _facts(self) -> dict[str, Any]:
        return {"camera": None, "quality": "exact", "gl": None, "versions": {"numpy": np.__version__}}


def optimal_action(env: DotEnv) -> NDArray[np.float32]:
    """The best action: straight to the goal on each axis as fast as allowed. The axes are independent, so no policy does better."""
    return np.clip((env.goal - env.agent) / SPEED, -1.0, 1.0).astype(np.float32)


def _side(size: int) -> int:
    return max(2, round(PATCH * size))


@lru_cache(maxsize=8)
def _art(size: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8]]:
    """Backgrounds (TEXTURES, S, S, 3), agent patch and goal patch (s, s, 3): the same on every machine."""
    rng = np.random.default_rng(20)
    coarse = rng.integers(40, 140, (TEXTURES, 16, 16, 3))
    fine = np.linspace(0, 16, size, endpoint=False).astype(np.int64)
    backgrounds = np.ascontiguousarray(coarse[:, fine][:, :, fine]).astype(np.uint8)
    side = _side(size)
    rows, columns = np.indices((side, side))
    checks = ((rows * 4 // side + columns * 4 // side) % 2)[..., None]
    agent = np.where(checks, (255, 200, 40), (230, 70, 20)).astype(np.uint8)
    rim = (np.minimum(rows, columns) < side / 4) | (np.maximum(rows, columns) >= side - side / 4)
    goal = np.where(rim[..., None], (30, 230, 90), (10, 90, 40)).astype(np.uint8)
    return backgrounds, agent, goal
