"""Check a user's environment: what its observations, pictures and actions become, how it behaves, and which methods can use it."""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import gymnasium
import numpy as np
from gymnasium.utils.env_checker import check_env as gymnasiums_check
from numpy.typing import NDArray

from localmotion import methods
from localmotion.envs import check_env, is_own, own_env
from localmotion.envs.gym_env import TIME_LIMIT, GymEnv, own_limit
from localmotion.envs.own import Own
from localmotion.envs.spaces import picture_problem, read_actions, read_observations
from localmotion.errors import ConfigError, LocalmotionError
from localmotion.files import one_line
from localmotion.foreign import FAULTS, cause
from localmotion.methods.base import GOAL

SMALL = 16
"""Pictures of a smaller side are probably codes and not pictures."""
COMPARED = 20
"""Env steps after which two environments with the same seed are compared."""


@dataclass
class EnvReport:
    """What `inspect_env` found."""

    name: str
    observations: dict[str, str] = field(default_factory=dict)
    """For each part of the observation: what becomes of it."""
    pictures: str = ""
    actions: str = ""
    episodes: str = ""
    rewards: str = ""
    milliseconds: dict[str, float] = field(default_factory=dict)
    """Mean wall-clock time of a reset, an env step without drawing, and a drawing."""
    repeatable: str = ""
    checker: list[str] = field(default_factory=list)
    """Findings of gymnasium's own checker."""
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """Why nothing can be trained on it. Empty: something can."""
    methods: dict[str, str] = field(default_factory=dict)
    """For each registered method "" if it can use the environment, else the reason."""

    @property
    def usable(self) -> bool:
        """Whether some method can be trained on it."""
        return not self.problems and not all(self.methods.values())

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return {**asdict(self), "usable": self.usable}

    def lines(self) -> list[str]:
        """The report in plain words."""
        out = [f"{self.name}: {'can be trained on' if self.usable else 'nothing can be trained on it'}"]
        out += [f"  problem: {text}" for text in self.problems]
        out += [f"observation {key}: {text}" for key, text in self.observations.items()]
        rows = {"pictures": self.pictures, "actions": self.actions, "episodes": self.episodes, "rewards": self.rewards}
        times = ", ".join(f"{name} {value:.2f} ms" for name, value in self.milliseconds.items())
        rows |= {"time": times, "same seed": self.repeatable}
        out += [f"{name}: {text}" for name, text in rows.items() if text]
        out += [f"gymnasium's checker: {text}" for text in self.checker or ["no findings"]]
        out += [f"note: {text}" for text in self.notes]
        width = max(map(len, self.methods), default=0)
        for name, reason in self.methods.items():
            stages = "" if reason else f"yes, stages {', '.join(methods.get(name).stages)}"
            out.append(f"method {name:{width}}  {stages or f'no: {reason}'}")
        return out


def inspect_env(name: str, options: Mapping[str, Any] | None = None, *, steps: int = 200, size: int = 64) -> EnvReport:
    """Make a user's environment, play ``steps`` env steps with random actions, and report what fits and what does not.

    Args:
        name: of an environment outside the package (`localmotion.envs.own`), which the user trusts.
        options: of the environment, and ``time_limit``.
        size: side of the agent's pictures.

    Raises ConfigError for a name that does not exist or is not trusted, and for an environment that cannot be made.
    """
    check_env(name, options or {})
    if not is_own(name):
        raise ConfigError(f"{name}: is built in and fits; check-env is for environments of your own (gym:ID or MODULE:CALLABLE)")
    if steps < 1:
        raise ConfigError(f"steps={steps} must be at least 1")
    found = own_env(name)
    given = dict(options or {})
    limit = given.pop("time_limit", None)
    report, inner = EnvReport(name), found.inner(given, limit)

    def make() -> GymEnv:
        return GymEnv(name, found.inner(given, limit), size=size, time_limit=limit)

    goals = _describe(report, inner, size)
    if not report.problems:
        try:
            _play(report, make, steps)
            _compare(report, make)
        except LocalmotionError as error:
            report.problems.append(one_line(error).removeprefix(f"{name}: "))
        except FAULTS as error:  # whatever the environment does
            report.problems.append(f"playing it failed: {cause(error)}")
    _gymnasiums(report, found, given, limit)
    _methods(report, isinstance(inner.action_space, gymnasium.spaces.Discrete), goals)
    try:
        inner.close()
    except FAULTS as error:
        report.notes.append(f"close() failed: {cause(error)}")
    return report


def _describe(report: EnvReport, inner: gymnasium.Env[Any, Any], size: int) -> bool:
    """What the spaces say. Returns whether there are goal pictures."""
    space: Any = inner.observation_space
    goals = False
    try:
        seen = read_observations(space)
    except ConfigError as error:
        report.problems.append(str(error))
        report.observations["as a whole"] = f"{_text(space)}, cannot be used"
    else:
        goals = seen.goal is not None
        for key, part in seen.parts.items():
            if key == seen.picture:
                text = f"the picture, {size}x{size}" + ("" if part.dtype == np.uint8 else ", floats times 255")
            elif key == seen.goal:
                text = "the goal picture, as it is at the reset"
            elif key in seen.numbers:
                text = (
                    f"a vector of {seen.length(key)}, recorded; --observed both or vectors gives it to methods that take vectors"
                )
            else:
                text = f"left out: {seen.left_out[key]}"
            report.observations[key] = f"{_text(part)} -> {text}"
        if seen.picture is None and inner.render_mode != "rgb_array":
            report.problems.append(
                "it has no picture: its observation has none (key image, pixels or rgb, H x W x 3 uint8), and its render_mode is"
                f" {inner.render_mode!r}, not 'rgb_array'"
            )
        if seen.picture and min(seen.parts[seen.picture].shape[:2]) < SMALL:  # type: ignore[index]
            report.notes.append(
                f"its pictures have a side below {SMALL}: are they codes of cells? A drawing is easier to learn from"
            )
        if "goal" in seen.parts and seen.goal is None:
            report.notes.append(f"goal is no goal picture: {picture_problem(seen.parts['goal'])}")
    try:
        actions = read_actions(inner.action_space)
    except ConfigError as error:
        report.problems.append(str(error))
        report.actions = f"{inner.action_space}, cannot be used"
    else:
        some = f"{actions.count} number{'s' if actions.count > 1 else ''} in [-1, 1], scaled to its bounds"
        report.actions = f"{inner.action_space} -> {f'a one-hot vector of {actions.count}' if actions.discrete else some}"
    return goals


def _text(space: Any) -> str:
    """A space in a few words: the bounds of many numbers are left out."""
    return (
        f"Box {'x'.join(map(str, space.shape)) or '1'} {space.dtype}" if isinstance(space, gymnasium.spaces.Box) else str(space)
    )


@dataclass
class _Played:
    """What random episodes showed."""

    rewards: list[float] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    terminated: int = 0
    truncated: int = 0
    success: int = 0
    signals: bool = False


def _play(report: EnvReport, make: Callable[[], GymEnv], steps: int) -> None:
    """Play with random actions, and measure."""
    env, rng = make(), np.random.default_rng(0)
    spent, counts = {"reset": 0.0, "env step": 0.0, "drawing": 0.0}, {"reset": 0, "env step": 0, "drawing": 0}

    def timed(what: str, call: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        out = call()
        spent[what] += time.perf_counter() - began
        counts[what] += 1
        return out

    played, length, ended = _Played(), 0, True
    env.show("vectors")  # a step then draws nothing
    env.show_goal(env.has_goals)
    for step in range(steps):
        if ended:
            timed("reset", lambda: env.reset(seed=step))  # noqa: B023
            length = 0
        _, reward, terminated, truncated, info = timed("env step", lambda: env.step(_random(env, rng)))
        timed("drawing", lambda: env.render_frame(env.size))
        length, ended = length + 1, terminated or truncated
        played.rewards.append(reward)
        played.signals |= "success" in info
        played.success += bool(info.get("success"))
        played.terminated, played.truncated = played.terminated + terminated, played.truncated + truncated
        played.lengths += [length] if ended else []
    height, width = env.picture().shape[:2]
    report.milliseconds = {what: round(1000 * spent[what] / max(counts[what], 1), 3) for what in spent}
    source = f"its observation {env.observations.picture!r}" if env.observations.picture else "render()"
    squeezed = "" if height == width else " (squeezed to a square)"
    how = "averaged" if min(height, width) >= env.size else "resized"
    report.pictures = f"{source}, {height}x{width}, {how} to {env.size}x{env.size}{squeezed}"
    report.rewards = f"{min(played.rewards):g} to {max(played.rewards):g} an env step, mean {np.mean(played.rewards):.3g}"
    bad = np.flatnonzero(~np.isfinite(played.rewards))
    if len(bad):
        report.problems.append(f"reward is not finite ({played.rewards[bad[0]]}) at env step {bad[0] + 1} of {steps}")
    if not any(played.rewards):
        report.notes.append("all rewards were zero: random actions do not find what is rewarded")
    _ends(report, env, played, steps)
    env.close()


def _ends(report: EnvReport, env: GymEnv, played: _Played, steps: int) -> None:
    """How episodes ended."""
    own = own_limit(env.inner)
    limit = f"time limit {env.time_limit} env steps" + (
        "" if own or env.time_limit != TIME_LIMIT else " (ours; option time_limit)"
    )
    ends = f"{played.terminated} terminated, {played.truncated} truncated in {steps} env steps of random actions"
    lengths = f", lengths {min(played.lengths)} to {max(played.lengths)}" if played.lengths else ""
    report.episodes = (
        f"{ends}{lengths}; {limit}; success is {f'signalled, {played.success} times' if played.signals else 'not signalled'}"
    )


def _random(env: GymEnv, rng: np.random.Generator) -> NDArray[np.float32]:
    count = env.actions.count
    if env.discrete:
        return np.eye(count, dtype=np.float32)[rng.integers(count)]
    return rng.uniform(-1, 1, count).astype(np.float32)


def _compare(report: EnvReport, make: Callable[[], GymEnv]) -> None:
    """Whether a seed decides everything, and whether another seed changes something."""

    def story(env: GymEnv, seed: int) -> list[Any]:
        rng = np.random.default_rng(1)
        seen: list[Any] = [env.reset(seed=seed)[0]]
        for _ in range(COMPARED):
            observed, reward, terminated, truncated, _ = env.step(_random(env, rng))
            seen += [observed, reward, terminated, truncated]
            if terminated or truncated:
                break
        return seen

    first, second = make(), make()
    one, again, other, changed = story(first, 3), story(first, 3), story(second, 3), story(second, 4)
    for env in (first, second):
        env.close()
    if not (_equal(one, again) and _equal(one, other)):
        where = "in a second episode of the same environment" if not _equal(one, again) else "in a second environment"
        report.repeatable = f"differs {where}"
        report.notes.append(
            "the same seed gives other episodes: draw all random numbers from self.np_random and reset everything in reset(seed=...);"
            " until then runs cannot be repeated or resumed to the bit"
        )
    else:
        report.repeatable = f"the same pictures, numbers and rewards for {COMPARED} env steps; another seed changes " + (
            "nothing" if _equal(one, changed) else "them"
        )


def _equal(one: list[Any], other: list[Any]) -> bool:
    def same(a: Any, b: Any) -> bool:
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)
        return bool(np.array_equal(a, b, equal_nan=True))  # a reward that is NaN both times

    return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))


def _gymnasiums(report: EnvReport, found: Own, options: Mapping[str, Any], limit: int | None) -> None:
    """Findings of gymnasium's checker on an environment of its own."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            env = found.inner(options, limit)
            gymnasiums_check(env.unwrapped, skip_render_check=True, skip_close_check=True)
            env.close()
        except FAULTS as error:  # the checker asserts, and the environment may raise anything
            what = cause(error) if isinstance(error, SystemExit) else f"{type(error).__name__}: {one_line(error)}"
            report.checker.append(what)
    texts = [one_line(re.sub("\x1b\\[[0-9]*m", "", str(warning.message))).removeprefix("WARN: ") for warning in caught]
    report.checker += list(dict.fromkeys(texts))


def _methods(report: EnvReport, discrete: bool, goals: bool) -> None:
    """Which registered methods can use the environment, and why others cannot."""
    for name in methods.names():
        try:
            cls = methods.get(name)
            config = cls.Config()
            needs_goal = any(cls.needs(config, stage) & GOAL for stage in cls.acts_after & set(cls.stages))
        except ConfigError as error:
            report.methods[name] = one_line(error)
            continue
        if report.problems:
            report.methods[name] = "see the problems above"
        elif discrete and not cls.discrete:
            report.methods[name] = "it acts with numbers in [-1, 1], and the actions are choices (Discrete)"
        elif needs_goal and not goals:
            report.methods[name] = "it acts towards a goal picture, and the observation has none (key goal)"
        else:
            report.methods[name] = ""
