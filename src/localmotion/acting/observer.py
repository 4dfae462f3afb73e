"""An environment and its streaming perception together: what the agent sees and what the replay stores."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from localmotion import methods
from localmotion.config import RunConfig
from localmotion.envs.returned import finite_reward
from localmotion.errors import LocalmotionError, SimulationError
from localmotion.foreign import FAULTS
from localmotion.methods.base import GOAL
from localmotion.recipe import Motion, Recipe

if TYPE_CHECKING:
    from localmotion.perception.stream import StreamingExtractor

SHOWN = ("image", "vector", "goal")
"""Keys of an observation that the agent gets and the replay stores, besides those that the environment has recorded
(`PixelEnv.recorded`)."""


def wants_goal(run: RunConfig) -> bool:
    """Whether the run's method needs goal pictures in the run's stage (`methods.base.GOAL`)."""
    return bool(methods.get(run.method).needs(run.model, run.stage) & GOAL)


class Observer:
    """One environment with its stream of Atomic Actions: what the agent sees and what the replay stores.

    Args:
        env: a localmotion environment, or any other whose observations are a dict. They have "image" or "vector", "percept" if
            perception uses another picture size, and "goal" if it has goal pictures.
        recipe: perception recipe, or None for methods without motion.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], recipe: Recipe | None) -> None:
        self.env, self.recipe = env, recipe
        self.shown = (*SHOWN, *(key for key in getattr(env, "recorded", ()) if key not in SHOWN))
        self.discrete: bool = getattr(env, "discrete", False)
        """Whether an action is a one-hot vector."""
        self.seconds = {"env": 0.0, "perception": 0.0}
        self.extractor: StreamingExtractor | None = None

    @property
    def action_dim(self) -> int:
        """Number of action dimensions."""
        shape = self.env.action_space.shape
        assert shape is not None
        return int(shape[0])

    @property
    def frame_rate(self) -> float | None:
        """Agent steps per second of real time. None if the environment does not know it."""
        rate = getattr(self.env, "metadata", {}).get("render_fps")
        return float(rate) if rate and np.isfinite(rate) and rate > 0 else None

    def spec(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shapes and dtypes of a replay record."""
        boxes: dict[str, Any] = self.env.observation_space.spaces  # type: ignore[attr-defined]
        spec: dict[str, tuple[tuple[int, ...], str]] = {
            **{key: (tuple(boxes[key].shape), boxes[key].dtype.name) for key in self.shown if key in boxes},
            "action": ((self.action_dim,), "float32"),
            "reward": ((), "float32"),
            "is_terminal": ((), "bool"),
        }
        if self.recipe:
            size, count = self.recipe.size, self.recipe.tracks
            spec |= {
                "flow": ((size, size, 2), "float16"),
                "tracks": ((count, 2), "float32"),
                "visible": ((count,), "bool"),
                "track_id": ((count,), "int32"),
            }
        return spec

    def reset(self, seed: int) -> dict[str, Any]:
        """Start an episode. Returns record 0, with a zero action and no motion. Raises SimulationError as `step`."""
        obs, _ = self._ask(lambda: self.env.reset(seed=seed))
        if self.recipe:
            from localmotion.perception.stream import StreamingExtractor

            self.extractor = StreamingExtractor(self.recipe, seed, self.env)
        zeros = np.zeros(self.action_dim, np.float32)
        return self._record(obs, zeros, 0.0, False, first=True)

    def step(self, action: NDArray[np.float32]) -> tuple[dict[str, Any], bool, dict[str, Any]]:
        """Make one agent step. Returns the record, whether the episode is over, and the environment's info.

        Raises SimulationError if the simulator fails or returns a non-finite reward.
        """
        obs, reward, terminated, truncated, info = self._ask(lambda: self.env.step(action))
        finite_reward(self._name, reward)
        return self._record(obs, action, float(reward), terminated, first=False), terminated or truncated, info

    def drawn(self, size: int) -> NDArray[np.uint8]:
        """The current picture, (size, size, 3). Raises SimulationError as `step`."""
        picture: NDArray[np.uint8] = self._ask(lambda: self.env.render_frame(size))  # type: ignore[attr-defined]
        return picture

    @property
    def _name(self) -> str:
        return str(getattr(self.env, "name", type(self.env).__name__))

    def _ask(self, ask: Callable[[], Any]) -> Any:
        """Call ``ask``, and raise a simulator's error, of any type, as SimulationError.

        Errors of misuse, for example a wrong action, stay as they are.
        """
        began = time.perf_counter()
        try:
            return ask()
        except LocalmotionError:
            raise
        except FAULTS as error:
            raise SimulationError(f"{self._name}: {type(error).__name__}: {error}") from error
        finally:
            self.seconds["env"] += time.perf_counter() - began

    def _record(
        self, obs: dict[str, Any], action: NDArray[np.float32], reward: float, terminal: bool, *, first: bool
    ) -> dict[str, Any]:
        record = {
            **{key: obs[key] for key in self.shown if key in obs},
            "action": action,
            "reward": reward,
            "is_terminal": terminal,
        }
        if self.recipe and self.extractor:
            began = time.perf_counter()
            frame = obs.get("percept", obs["image"])
            motion = self.extractor.reset(frame) if first else self.extractor.step(frame)
            record |= {
                "flow": motion.flow,
                "tracks": motion.tracks,
                "visible": motion.visible,
                "track_id": motion.track_id,
            }
            self.seconds["perception"] += time.perf_counter() - began
        return record


def make_observer(run: RunConfig, recipe: Recipe | None, *, size: int = 64, goal: bool | None = None) -> Observer:
    """The environment of a run with its perception. A picture is rendered once, at the size that perception needs.

    ``size`` is the side of "image" for methods without motion. A recipe sets its own size. ``goal``: whether observations have goal
    pictures; None: if the run's method needs them.
    """
    from localmotion.envs import make_env

    if recipe:
        size = recipe.size
    percept = recipe.percept_size if recipe and recipe.percept_size != size else None
    env = make_env(
        run.env,
        seed=run.seed,
        size=size,
        percept_size=percept,
        quality=run.quality,
        action_repeat=run.action_repeat or None,
        supersample=run.supersample,
        observed=run.observed,
        goal=wants_goal(run) if goal is None else goal,
        **run.env_options,
    )
    return Observer(env, recipe)


def streaming_recipe(recipe: Recipe, motion: Motion = "recipe") -> Recipe:
    """A clip store's recipe, changed for streaming perception: no look-ahead, every frame of the environment, ``motion`` as asked for."""
    return replace(recipe, redraw_rounds=0, frame_stride=1, fps=0.0).with_motion(motion)
