"""Small gymnasium environments as users write them, for the tests of environments outside the package."""

from __future__ import annotations

import sys
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces


class Walk(gymnasium.Env[Any, Any]):
    """A number that actions move. Observation and action space are given; pictures show the number as a grey level.

    Reward is the number. It terminates at 3 or above, and truncates itself after ``limit`` env steps. Its numbers are position (1,),
    speed (2,) and one of three kinds.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 7}

    def __init__(
        self, observation: spaces.Space[Any], action: spaces.Space[Any], render_mode: str | None = None, limit: int = 100
    ) -> None:
        self.observation_space, self.action_space, self.render_mode, self.limit = observation, action, render_mode, limit
        self.taken: list[Any] = []
        self.buffer = np.zeros(1, np.float32)  # returned again and again, as careless environments do

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.at, self.steps, self.goal = float(self.np_random.uniform(0, 1)), 0, int(self.np_random.integers(256))
        return self.observation(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.taken.append(action)
        self.at += float(np.sum(action))
        self.steps += 1
        info = {"is_success": self.at > 2} if self.steps > 1 else {}
        return self.observation(), self.at, self.at >= 3, self.steps >= self.limit, info

    def observation(self) -> Any:
        if not isinstance(self.observation_space, spaces.Dict):
            return self.part("state", self.observation_space)
        return {key: self.part(key, space) for key, space in self.observation_space.spaces.items()}

    def part(self, key: str, space: Any) -> Any:
        if len(space.shape or ()) == 3:
            level = (self.goal + self.steps) % 256 if key == "goal" else self.level
            return np.full(space.shape, level if space.dtype == np.uint8 else level / 255, space.dtype)
        if isinstance(space, spaces.Discrete):
            return self.steps % 3
        self.buffer[:] = self.at
        return self.buffer if space.shape == (1,) else np.full(space.shape, self.steps, space.dtype)

    @property
    def level(self) -> int:
        return int(100 * self.at) % 256

    def render(self) -> Any:
        """Left half with stripes as bright as the number, right half black, wider than high."""
        picture = np.zeros((20, 40, 3), np.uint8)
        picture[::2, :20] = self.level
        return picture


NUMBERS = {
    "position": spaces.Box(-9, 9, (1,), np.float32),
    "speed": spaces.Box(0, 99, (2,), np.float64),
    "kind": spaces.Discrete(3),
}


def picture(*shape: int) -> spaces.Box:
    """Space of uint8 pictures."""
    return spaces.Box(0, 255, shape, np.uint8)


def choices(limit: int = 6, offset: int = 0) -> Walk:
    """Choices, pictures and numbers in the observation, a goal picture."""
    seen = spaces.Dict({"image": picture(32, 32, 3), "goal": picture(32, 32, 3), **NUMBERS})
    return Walk(seen, spaces.Discrete(3, start=offset), limit=limit)


def drawn(limit: int = 100, low: float = -0.5, render_mode: str | None = None, **more: Any) -> Walk:
    """Numbers only, with actions between ``low`` and 1.5; pictures are rendered."""
    return Walk(NUMBERS["position"], spaces.Box(low, 1.5, (2,), np.float32), render_mode, limit)


def strict(size: int = 3, *, camera: str = "left") -> Walk:
    """Takes arguments that are also names of settings."""
    made = drawn(render_mode="rgb_array")
    made.asked = (size, camera)  # type: ignore[attr-defined]
    return made


def unbounded() -> Walk:
    return Walk(NUMBERS["position"], spaces.Box(-np.inf, np.inf, (2,), np.float32), "rgb_array")


def forgetful() -> Walk:
    """Its start does not depend on the seed."""
    made = choices()
    begin = made.reset

    def reset(*, seed: int | None = None, options: Any = None) -> Any:
        return begin(seed=None if made.np_random is None else int(np.random.default_rng().integers(2**31)))

    made.reset = reset  # type: ignore[method-assign]
    return made


def suite(task: str, offset: int = 0) -> Walk:
    """A suite of one task, for an entry point."""
    assert task == "choices"
    return choices(offset=offset)


class Loose(Walk):
    """Takes any arguments."""

    def __init__(self, **options: Any) -> None:
        super().__init__(NUMBERS["speed"], spaces.Discrete(2), **options)


class Named(Walk):
    """Has the argument, and says that it cannot draw."""

    metadata = {"render_modes": ["human"]}

    def __init__(self, render_mode: str | None = None) -> None:
        super().__init__(NUMBERS["speed"], spaces.Discrete(2), render_mode)


suite.tasks = ("choices",)  # type: ignore[attr-defined]
not_an_env = dict


def pictures() -> Walk:
    """No numbers."""
    return Walk(picture(32, 32, 3), spaces.Discrete(2))


def blind() -> Walk:
    """Neither pictures nor actions that can be used."""
    return Walk(NUMBERS["speed"], spaces.MultiBinary(2))


def breaking() -> Walk:
    """Fails at the fifth env step."""
    made = choices(limit=100)
    step = made.step

    def wrong(action: Any) -> Any:
        return step(int(action) // (4 - made.steps))

    made.step = wrong  # type: ignore[method-assign]
    return made


def shaky(at: str = "step", every: int = 2, when: int = 3, render_mode: str | None = None) -> Walk:
    """Fails in episodes whose seed ``every`` divides: in the reset, or at env step ``when``, with an error or with a reward of NaN.

    After that this instance is of no use.
    """
    made = Walk(NUMBERS["position"], spaces.Box(-0.1, 0.1, (2,), np.float32), render_mode, limit=6)  # it never gets to 3
    begin, go, failing, broken = made.reset, made.step, [False], [False]

    def reset(*, seed: int | None = None, options: Any = None) -> Any:
        failing[0] = bool(seed) and seed % every == 0  # its pictures are tried with seed 0
        broken[0] |= at == "reset" and failing[0]
        if broken[0]:
            raise RuntimeError("no floor")
        return begin(seed=seed)

    def step(action: Any) -> Any:
        found = go(action)
        if not failing[0] or made.steps < when:
            return found
        broken[0] = True
        if at == "step":
            raise RuntimeError("through the wall")
        return (found[0], float("nan"), *found[2:])

    made.reset, made.step = reset, step  # type: ignore[method-assign]
    return made


def quits(at: str = "step") -> Walk:
    """Ends the program where it is asked to: make, reset, step, render or close."""
    if at == "make":
        sys.exit(3)
    made = drawn(render_mode="rgb_array")
    setattr(made, at, lambda *_, **__: sys.exit(3))
    return made


def wrong(**changed: Any) -> Walk:
    """`reset` and `step` return something else: ``observation``, ``reward``, ``truncated`` or ``info``, or ``keep`` of the values alone.

    ``observation`` changes parts by key; None takes one away. ``after``: from this env step on. ``floats``: pictures are floats.
    """
    keep, after = changed.get("keep"), changed.get("after", 0)
    image = spaces.Box(0, 1, (32, 32, 3), np.float32) if changed.get("floats") else picture(32, 32, 3)
    made = Walk(spaces.Dict({"image": image, "goal": picture(32, 32, 3), **NUMBERS}), spaces.Discrete(3))
    reset, step = made.reset, made.step

    def seen(observation: Any) -> Any:
        change = changed.get("observation", {})
        if not isinstance(change, dict) or made.steps < after:
            return observation if made.steps < after else change
        return {key: value for key, value in {**observation, **change}.items() if value is not None}

    def begin(**given: Any) -> Any:
        observation, info = reset(**given)
        return seen(observation) if keep == 1 else (seen(observation), info)

    def go(action: Any) -> Any:
        observation, reward, terminated, truncated, info = step(action)
        given = {"reward": reward, "truncated": truncated, "info": info} | (changed if made.steps >= after else {})
        found = (seen(observation), given["reward"], terminated, given["truncated"], given["info"])
        return found[:keep]

    made.reset, made.step = begin, go  # type: ignore[method-assign]
    return made
