"""A user's gymnasium environment with the interface of all others (docs/own_environments.md)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from localmotion.envs.base import Observation, PixelEnv
from localmotion.envs.returned import RESET, STEP, flag, mapping, number, values
from localmotion.envs.spaces import fit, read_actions, read_observations
from localmotion.errors import ConfigError, EnvError, LocalmotionError, SimulationError
from localmotion.foreign import FAULTS, cause

TIME_LIMIT = 1000
"""Env steps of an episode if neither the environment nor the user limits it. A replay takes whole episodes only."""
SUCCESS = ("success", "is_success")


class GymEnv(PixelEnv):
    """``inner``, a gymnasium environment, as a `PixelEnv`.

    Its picture comes from the observation or from ``render()`` and is averaged to ``size``. Other numbers of the observation are vectors
    (V,) float32 under their own keys; joined in the order of the observation, they are ``vector()``. An action of a Discrete space is a
    one-hot vector. ``terminated`` and ``truncated`` are the environment's; ``info`` has ``success`` where it has success or is_success.
    ``goal`` is the observation's picture of this name at the reset.

    Raises:
        ConfigError: a picture or an action space that cannot be used, or no picture at all; the message says what to do.
        EnvError: an environment that cannot be reset or drawn. Errors of its own code are SimulationErrors with the place.
    """

    def __init__(
        self,
        name: str,
        inner: gymnasium.Env[Any, Any],
        *,
        seed: int = 0,
        size: int = 64,
        percept_size: int | None = None,
        action_repeat: int | None = None,
        time_limit: int | None = None,
    ) -> None:
        self.inner = inner
        try:
            self.observations, self.actions = read_observations(inner.observation_space), read_actions(inner.action_space)
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from error
        super().__init__(
            name,
            seed=seed,
            size=size,
            percept_size=percept_size,
            action_dim=self.actions.count,
            action_repeat=1 if action_repeat is None else action_repeat,
            time_limit=(own_limit(inner) or TIME_LIMIT) if time_limit is None else time_limit,
        )
        self.discrete, self.recorded = self.actions.discrete, self.observations.numbers
        self.action_space = self.actions.box()  # type: ignore[assignment]
        self.action_space.seed(seed)
        if rate := inner.metadata.get("render_fps"):  # of env steps
            self.metadata = {**self.metadata, "render_fps": max(1, round(rate / self.action_repeat))}
        self._set_space(self._pictures)
        self._seen: Mapping[str, Any] = {}
        self._at = 0  # env steps of this episode
        self._truncated = False
        self._met: float | None = None
        if self.observations.picture is None:
            self._try_to_draw()

    def _try_to_draw(self) -> None:
        """Draw once, so that a missing package or render mode is an error before the run and not in it."""
        if self.inner.render_mode != "rgb_array":
            raise ConfigError(
                f"{self.name}: no picture: its observation has none (key image, pixels or rgb, H x W x 3), and its render_mode is"
                f" {self.inner.render_mode!r}, not 'rgb_array'; make it with one of the two"
            )
        self._begin(0)
        self.picture()

    @contextmanager
    def _calls(self, what: str) -> Iterator[None]:
        """Call the environment's own code inside this context: an error names the environment, the call and the place."""
        try:
            yield
        except LocalmotionError:
            raise
        except FAULTS as error:
            raise SimulationError(f"{self.name}: {what}() failed: {cause(error)}") from error

    @contextmanager
    def _reads(self) -> Iterator[None]:
        """Read what the environment returned inside this context: an error names the environment."""
        try:
            yield
        except SimulationError as error:
            raise SimulationError(f"{self.name}: {error} at env step {self._at} of its episode") from error
        except EnvError as error:
            raise EnvError(f"{self.name}: {error}") from error

    def _begin(self, episode_seed: int) -> None:
        with self._calls("reset"):
            returned = self.inner.reset(seed=episode_seed)
        self._at, self._truncated, self._met = 0, False, None
        with self._reads():
            self._seen = self.observations.split(values("reset", returned, RESET)[0])

    def _control(self, action: NDArray[np.float64]) -> tuple[float, bool]:
        with self._calls("step"):
            returned = self.inner.step(self.actions.given(action))
        self._at += 1
        with self._reads():
            found, reward, terminated, truncated, info = values("step", returned, STEP)
            self._seen, self._truncated = self.observations.split(found), flag("truncated", truncated)
            for key in SUCCESS:
                if key in mapping("info", info):
                    self._met = max(self._met or 0.0, number(f"info[{key!r}]", info[key]))
            return number("reward", reward), flag("terminated", terminated)

    def _cut(self) -> bool:
        return self._truncated

    def _checked(self, action: NDArray[np.float32]) -> NDArray[np.float64]:
        if not self.discrete:
            return super()._checked(action)
        given = np.asarray(action, np.float64)
        if given.shape != self.action_space.shape or sorted(given.tolist()) != [0.0] * (len(given) - 1) + [1.0]:
            raise EnvError(f"{self.name}: action {given.tolist()} is not a one-hot vector of {self.actions.count} numbers")
        return given

    def picture(self) -> NDArray[np.uint8]:
        """The current picture as the environment gives it, (H, W, 3)."""
        key = self.observations.picture
        if key is not None:
            with self._reads():
                return self.observations.image(self._seen, key)
        with self._calls("render"):
            drawn: Any = self.inner.render()
        if not isinstance(drawn, np.ndarray) or drawn.ndim != 3 or drawn.shape[-1] != 3 or drawn.dtype != np.uint8:
            what = f"{drawn.dtype} of shape {drawn.shape}" if isinstance(drawn, np.ndarray) else type(drawn).__name__
            raise EnvError(f"{self.name}: render() returned {what}; with render_mode 'rgb_array' it returns H x W x 3 uint8")
        return drawn

    def _draw(self, size: int) -> NDArray[np.uint8]:
        return fit(self.picture(), size)

    @property
    def has_goals(self) -> bool:
        """Whether the observation has a picture ``goal``."""
        return self.observations.goal is not None

    def show_goal(self, on: bool = True) -> None:
        """As `PixelEnv.show_goal`."""
        if on and not self.has_goals:
            raise ConfigError(f"{self.name}: has no goal pictures; give its observation a picture under the key 'goal'")
        super().show_goal(on)

    def _goal_picture(self, episode_seed: int) -> tuple[NDArray[np.uint8], bool]:
        with self._reads():
            picture = self.observations.image(self._seen, self.observations.goal or "")
        return self._averaged(fit(picture, self.draw_size)), True

    def vector(self) -> NDArray[np.float64]:
        """All numbers of the observation, (V,); V is 0 if it has none."""
        return np.concatenate([np.zeros(0), *self._numbers().values()])

    def state(self) -> NDArray[np.float64]:
        """As `vector`: the simulator's own state is not known."""
        return self.vector()

    def _set_space(self, boxes: Mapping[str, Any]) -> None:
        own = {key: spaces.Box(-np.inf, np.inf, (self.observations.length(key),), np.float32) for key in self.recorded}
        super()._set_space({**own, **boxes})

    def _observe(self) -> Observation:
        return {**self._numbers(), **super()._observe()}

    def _numbers(self) -> Observation:
        """The numbers of the newest observation, by key."""
        with self._reads():
            return {key: self.observations.vector(self._seen, key) for key in self.recorded}

    def _info(self, env_steps: int) -> dict[str, Any]:
        met, self._met = self._met, None
        return {"env_steps": env_steps, **({} if met is None else {"success": met})}

    def _facts(self) -> dict[str, Any]:
        return {
            "camera": None,
            "quality": "of the environment",
            "gl": None,
            "pictures": self.observations.picture or "render",
            "recorded": list(self.recorded),
            "actions": self.actions.to_json(),
            "left_out": dict(self.observations.left_out),
            "versions": {"gymnasium": gymnasium.__version__},
        }

    def close(self) -> None:
        """Close the environment itself."""
        with self._calls("close"):
            self.inner.close()


def own_limit(inner: gymnasium.Env[Any, Any]) -> int | None:
    """Env steps after which the environment itself truncates an episode, as far as gymnasium knows."""
    return getattr(inner.spec, "max_episode_steps", None)
