"""Shared by all environments: one picture at two sizes, normalised actions, seeds, time limits and errors for misuse."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, get_args

import cv2
import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.utils import seeding
from numpy.typing import NDArray

from localmotion.errors import ConfigError, EnvError, unknown_name

Observation = dict[str, NDArray[Any]]
Observed = Literal["pixels", "vectors", "both"]
OBSERVED: tuple[Observed, ...] = get_args(Observed)
TOLERANCE = 1e-3
"""Actions outside [-1, 1] by at most this much (rounding of a network's output) are clipped; larger ones are an error."""
VIEW_SIZE = 256


class PixelEnv(gymnasium.Env[Observation, NDArray[np.float32]]):
    """A gymnasium environment with pictures as observations.

    Observation: Dict with ``image`` (size, size, 3) uint8 and, when ``percept_size`` is given and differs, ``percept``
    (percept_size, percept_size, 3) uint8. Both come from ONE rendering at ``percept_size``; ``image`` is its area average.
    After ``show("vectors")`` it is only ``vector`` (V,) float32, without rendering; after ``show("both")`` both.
    After ``show_goal()`` also ``goal`` (size, size, 3) uint8: a picture of this episode's task solved, drawn once at the reset as ``image``
    is. The episode is the same with and without it.
    Action: Box(-1, 1, (A,), float32), mapped linearly to the range of the environment.
    ``step`` applies the action ``action_repeat`` times and sums the rewards; one application is one env step (control step).
    ``info`` always has ``env_steps``, the env steps done in this call, and ``success`` (0 or 1) in suites that signal it.

    Every reset starts from a state that is a pure function of one number: the given seed, or the next number of the environment's own
    generator. It does not depend on earlier episodes or any global generator.

    Args:
        name: full name, e.g. "dmc:walker_walk".
        seed: seed of the environment's own generator, used until a reset passes another.
        size: side of ``image``.
        percept_size: side of ``percept``, a multiple of ``size``; None for none.
        action_dim: A.
        action_repeat: env steps per call of ``step``.
        time_limit: env steps after which an episode is truncated.

    Raises:
        ConfigError: a setting out of range.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"]}
    """With ``render_fps``, agent steps per second of real time, in environments that know it."""
    has_success: ClassVar[bool] = False
    discrete: bool = False
    """Whether an action is one of A, given as a one-hot vector, instead of A numbers in [-1, 1]."""
    recorded: tuple[str, ...] = ()
    """Keys of the observation that the replay records although no method reads them."""

    def __init__(
        self,
        name: str,
        *,
        seed: int,
        size: int,
        percept_size: int | None,
        action_dim: int,
        action_repeat: int,
        time_limit: int,
    ) -> None:
        check_sizes(size, percept_size)
        for label, value in (("action_repeat", action_repeat), ("time_limit", time_limit)):
            if value < 1:
                raise ConfigError(f"{label}={value} of {name} must be at least 1")
        self.name, self.size, self.draw_size = name, size, percept_size or size
        self.action_repeat, self.time_limit = action_repeat, time_limit
        self.render_mode = "rgb_array"
        boxes: dict[str, Any] = {"image": spaces.Box(0, 255, (size, size, 3), np.uint8)}
        if self.draw_size != size:
            boxes["percept"] = spaces.Box(0, 255, (self.draw_size, self.draw_size, 3), np.uint8)
        self._pictures = boxes
        self.observation_space = spaces.Dict(boxes)  # type: ignore[assignment]
        self.action_space = spaces.Box(-1.0, 1.0, (action_dim,), np.float32)
        self.action_space.seed(seed)
        self._np_random, self._np_random_seed = seeding.np_random(seed)
        self.observed: Observed = "pixels"
        self.shows_goal = False
        self._goal: NDArray[np.uint8] | None = None  # of this episode
        self._elapsed: int | None = None  # env steps of this episode; None: no episode is running
        self._begun = False
        self.supersample = 1
        """Pictures are drawn at this multiple of their side and averaged. Edges then move by less than a pixel instead of jumping."""

    # -- implemented by a suite ------------------------------------------------------------------------------------------

    def _begin(self, episode_seed: int) -> None:
        """Start an episode. ``episode_seed`` (0 .. 2**31 - 1) determines everything random in it."""
        raise NotImplementedError

    def _control(self, action: NDArray[np.float64]) -> tuple[float, bool]:
        """One env step with ``action`` (A,) in [-1, 1]: reward and whether the task ended."""
        raise NotImplementedError

    def _draw(self, size: int) -> NDArray[np.uint8]:
        """Picture of the current state, (size, size, 3)."""
        raise NotImplementedError

    @property
    def has_goals(self) -> bool:
        """Whether the environment has goal pictures (`show_goal`). One that has implements `_solve`."""
        return False

    def _solve(self, episode_seed: int) -> bool:
        """Bring the episode that ``_begin(episode_seed)`` has just begun into a state in which its task is solved, for the goal picture.

        What does not belong to the task, such as a moving background, stays as at the reset. The state follows from ``episode_seed``
        alone. Afterwards ``_begin(episode_seed)`` is called again, so the episode may be spoilt. Returns whether the task is solved.
        """
        raise NotImplementedError

    def _cut(self) -> bool:
        """Whether the suite itself ends the episode here although the task has not ended, e.g. by a time limit of its own."""
        return False

    def _success(self) -> float:
        """1.0 while the task's goal is met, for suites that signal it."""
        return 0.0

    def _facts(self) -> dict[str, Any]:
        """The suite's part of ``describe``."""
        return {}

    def vector(self) -> NDArray[np.float64]:
        """The suite's own low-dimensional observation of the current state, (V,), for agents without pictures."""
        return self.state()

    def state(self) -> NDArray[np.float64]:
        """The simulator's exact state as one vector. Environments with equal vectors behave and look the same."""
        raise NotImplementedError

    def show(self, observed: Observed) -> None:
        """Choose the content of observations from the next reset on: "pixels", "vectors" or "both". Raises ConfigError for another name."""
        if observed not in OBSERVED:
            raise unknown_name("kind of observation", observed, OBSERVED)
        boxes = {} if observed == "vectors" else dict(self._pictures)
        if observed != "pixels":
            self._begin(0)  # some tasks have no observation before their first episode
            boxes["vector"] = spaces.Box(-np.inf, np.inf, (len(self.vector()),), np.float32)
        self.observed = observed
        self._set_space(boxes)

    def show_goal(self, on: bool = True) -> None:
        """Choose whether observations have ``goal`` from the next reset on. Raises ConfigError if the environment has no goal pictures."""
        if on and not self.has_goals:
            from localmotion.envs.goals import no_goals

            raise no_goals(self.name)
        self.shows_goal = on
        self._set_space(self.observation_space.spaces)  # type: ignore[attr-defined]

    def _set_space(self, boxes: Mapping[str, Any]) -> None:
        """Make ``boxes`` the spaces of the observation, with or without that of the goal."""
        goal = {"goal": spaces.Box(0, 255, (self.size, self.size, 3), np.uint8)} if self.shows_goal else {}
        kept = {key: box for key, box in boxes.items() if key != "goal"}
        self.observation_space = spaces.Dict({**kept, **goal})  # type: ignore[assignment]

    # -- gymnasium ------------------------------------------------------------------------------------------------------

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Observation, dict[str, Any]]:
        """Start an episode. The same ``seed`` gives bit-identical states and pictures; ``options`` are not used.

        With a goal picture, ``info["goal_solved"]`` is 1 if it shows the task solved, and 0 if it shows the nearest state that was found.
        """
        super().reset(seed=seed)
        episode_seed = int(self.np_random.integers(2**31))
        self._begin(episode_seed)
        self._elapsed, self._begun = 0, True
        if not self.shows_goal:
            return self._observe(), self._info(0)
        self._goal, solved = self._goal_picture(episode_seed)
        return self._observe(), self._info(0) | {"goal_solved": float(solved)}

    def _goal_picture(self, episode_seed: int) -> tuple[NDArray[np.uint8], bool]:
        """The goal picture (size, size, 3) of the episode that has just begun, and whether it shows the task solved."""
        solved = self._solve(episode_seed)
        picture = self._averaged(self.render_frame(self.draw_size))
        self._begin(episode_seed)
        return picture, solved

    def step(self, action: NDArray[np.float32]) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """One agent step: ``action`` (A,) applied ``action_repeat`` times, or fewer if the episode ends.

        Raises:
            EnvError: before a reset or after the end of an episode; an action of a wrong shape, not finite, or outside [-1, 1].
        """
        if self._elapsed is None:
            raise EnvError(
                f"{self.name}: the episode is over, call reset() before step()"
                if self._begun
                else f"{self.name}: call reset() before step()"
            )
        checked = self._checked(action)
        total, done, terminated, cut = 0.0, 0, False, False
        while done < self.action_repeat and not (terminated or cut):
            reward, terminated = self._control(checked)
            total += reward
            done += 1
            self._elapsed += 1
            cut = self._elapsed >= self.time_limit or self._cut()
        truncated = cut and not terminated
        if terminated or truncated:
            self._elapsed = None
        return self._observe(), float(total), terminated, truncated, self._info(done)

    def render(self) -> NDArray[np.uint8]:
        """The current picture at viewing size, (256, 256, 3) uint8."""
        return self.render_frame(VIEW_SIZE)

    def render_frame(self, size: int) -> NDArray[np.uint8]:
        """The current picture at any size, (size, size, 3) uint8, e.g. for a video.

        Raises:
            EnvError: before the first reset.
        """
        if not self._begun:
            raise EnvError(f"{self.name}: call reset() before render()")
        if self.supersample == 1:
            return self._draw(size)
        return area_average(self._draw(self.supersample * size), size)

    def describe(self) -> dict[str, Any]:
        """Description that a run stores: JSON-able, sufficient to make the environment again and to compare two runs."""
        suite, _, task = self.name.partition(":")
        return {
            "name": self.name,
            "suite": suite,
            "task": task,
            "size": self.size,
            "percept_size": self.draw_size,
            "supersample": self.supersample,
            "observed": self.observed,
            **({"goal": True} if self.shows_goal else {}),
            "action_dim": self.action_space.shape[0],  # type: ignore[index]
            **({"discrete": True} if self.discrete else {}),
            "action_repeat": self.action_repeat,
            "time_limit": self.time_limit,
            **self._facts(),
        }

    def _checked(self, action: NDArray[np.float32]) -> NDArray[np.float64]:
        """The action as float64 within [-1, 1]; raises EnvError with the reason if it is invalid."""
        given = np.asarray(action, dtype=np.float64)
        if given.shape != self.action_space.shape:
            raise EnvError(f"{self.name}: action has shape {given.shape}, expected {self.action_space.shape}")
        largest = float(np.abs(given).max())
        if not np.isfinite(largest):
            raise EnvError(f"{self.name}: action {given.tolist()} is not finite; the policy gave NaN or infinity")
        if largest > 1.0:
            if largest > 1.0 + TOLERANCE:
                raise EnvError(f"{self.name}: action {given.tolist()} is outside [-1, 1]; squash or clip the policy's output")
            given = np.clip(given, -1.0, 1.0)
        return given

    def _observe(self) -> Observation:
        shown: Observation = {} if self.observed == "pixels" else {"vector": self.vector().astype(np.float32)}
        if self.shows_goal and self._goal is not None:
            shown["goal"] = self._goal.copy()
        if self.observed == "vectors":
            return shown
        picture = self.render_frame(self.draw_size)
        if self.draw_size == self.size:
            return shown | {"image": picture}
        return shown | {"image": self._averaged(picture), "percept": picture}

    def _averaged(self, picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """A picture of the drawn size at the agent's size."""
        return picture if self.draw_size == self.size else area_average(picture, self.size)

    def _info(self, env_steps: int) -> dict[str, Any]:
        info: dict[str, Any] = {"env_steps": env_steps}
        if self.has_success:
            info["success"] = self._success() if env_steps else 0.0
        return info


def check_sizes(size: int, percept_size: int | None) -> None:
    """Raise ConfigError unless 8 <= size <= 1024 and percept_size is None or a multiple of it, up to 1024."""
    if not 8 <= size <= 1024:
        raise ConfigError(f"size={size} is out of range 8..1024")
    if percept_size is not None and (percept_size < size or percept_size > 1024 or percept_size % size):
        raise ConfigError(f"percept_size={percept_size} must be a multiple of size={size}, at most 1024")


def area_average(picture: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """(k * size, k * size, 3) uint8 averaged over k x k blocks to (size, size, 3)."""
    return np.asarray(cv2.resize(picture, (size, size), interpolation=cv2.INTER_AREA), dtype=np.uint8)
