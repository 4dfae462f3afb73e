"""Spaces of a gymnasium environment: which parts of an observation are pictures or numbers, and how a method's action is given to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from localmotion.envs.returned import said
from localmotion.errors import ConfigError, EnvError, SimulationError
from localmotion.files import one_line

PICTURES = ("image", "pixels", "rgb")
"""Keys of an observation under which its picture is looked for, in this order."""
GOAL, PLAIN = "goal", "state"
"""Key of the goal picture, and the key that an observation of numbers without keys gets."""
TAKEN = frozenset({"image", "percept", "action", "reward", "is_first", "is_last", "is_terminal"}) | {
    "goal", "flow", "tracks", "visible", "track_id", "mask", "labelled",
}  # fmt: skip
"""Keys of a batch with a meaning of their own (`methods.base`)."""


def picture_problem(space: spaces.Space[Any]) -> str:
    """Why a space is not one of pictures, "" if it is: H x W x 3 or H x W x 1, uint8 or floats in 0..1."""
    if not isinstance(space, spaces.Box):
        return f"{type(space).__name__} is not a picture"
    if len(space.shape) != 3 or space.shape[-1] not in (1, 3):
        first = len(space.shape) == 3 and space.shape[0] in (1, 3)
        return f"shape {space.shape} is not H x W x 3{'; move the channels to the end' if first else ''}"
    if space.dtype == np.uint8:
        return ""
    low, high = float(space.low.min()), float(space.high.max())
    if space.dtype.kind != "f":
        return f"pictures are uint8 (0 to 255) or floats in 0..1, not {space.dtype}"
    return (
        "" if low >= 0 and high <= 1 else f"floats must be in 0..1, but its bounds are {low:g} and {high:g}; give uint8 instead"
    )


def numbers_problem(space: spaces.Space[Any]) -> str:
    """Why a space is not one of numbers that fit a vector, "" if it is."""
    if isinstance(space, (spaces.Dict, spaces.Tuple)):
        parts = space.spaces.values() if isinstance(space, spaces.Dict) else space.spaces
        return next((problem for part in parts if (problem := numbers_problem(part))), "")
    if isinstance(space, spaces.Box):
        return "" if len(space.shape) <= 2 else f"shape {space.shape} is not that of a vector"
    known = isinstance(space, (spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary))
    return "" if known else f"{type(space).__name__} has no fixed number of numbers"


@dataclass(frozen=True)
class Observations:
    """The parts of an observation by key, and what becomes of each."""

    parts: Mapping[str, spaces.Space[Any]]
    keyed: bool
    """Whether the observation is a dict."""
    picture: str | None
    """Key of the picture; None: the environment is rendered."""
    goal: str | None
    """Key of the goal picture, if there is one."""
    numbers: tuple[str, ...]
    """Keys of the parts that become vectors."""
    left_out: Mapping[str, str]
    """Keys of the other parts, and why they are not used."""

    def split(self, observation: Any) -> Mapping[str, Any]:
        """An observation by key. Raises EnvError for one that is no dict although its space is one."""
        if not self.keyed:
            return {next(iter(self.parts)): observation}
        if not isinstance(observation, Mapping):
            raise EnvError(f"the observation is {said(observation)}; its space is a Dict of {', '.join(self.parts)}")
        return observation

    def length(self, key: str) -> int:
        """Number of numbers of a part."""
        return int(spaces.flatdim(self.parts[key]))

    def vector(self, seen: Mapping[str, Any], key: str) -> NDArray[np.float32]:
        """A part as one vector (`gymnasium.spaces.flatten`: one of n choices is a one-hot vector).

        Raises EnvError for what the space cannot have, SimulationError for numbers that are not finite.
        """
        value, space = _value(seen, key), self.parts[key]
        try:
            _check_choices(space, value)
            with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, which is an error below
                found = np.asarray(spaces.flatten(space, value)).astype(np.float32)
        except Exception as error:  # gymnasium flattens whatever it is given
            raise EnvError(f"observation {key!r} is {said(value)}, which its space does not have: {space!s:.100}") from error
        if len(found) != self.length(key):
            raise EnvError(f"observation {key!r} has shape {np.shape(value)}, its space says {space.shape}")
        _check_finite(key, found)
        return found

    def image(self, seen: Mapping[str, Any], key: str) -> NDArray[np.uint8]:
        """A picture part as (H, W, 3) uint8. Floats in 0..1 are multiplied by 255 and rounded.

        Raises as `vector`, and for floats where the space has none or the other way round: their range is then not known.
        """
        value, space = np.asarray(_value(seen, key)), self.parts[key]
        if value.shape != space.shape:
            raise EnvError(f"observation {key!r} has shape {value.shape}, its space says {space.shape}")
        if (value.dtype.kind == "f") != (space.dtype != np.uint8):
            raise EnvError(
                f"observation {key!r} is a picture of {value.dtype}, its space says {space.dtype}; return what the space says:"
                " uint8 in 0..255, or floats in 0..1"
            )
        if value.dtype.kind == "f":
            _check_finite(key, value)
            value = np.rint(255 * np.clip(value, 0, 1))
        return np.repeat(value, 3, -1).astype(np.uint8) if value.shape[-1] == 1 else value.astype(np.uint8)


def _value(seen: Mapping[str, Any], key: str) -> Any:
    if key not in seen:
        raise EnvError(f"the observation has no {key!r}, its space has it; it has {', '.join(map(str, seen)) or 'nothing'}")
    return seen[key]


def _check_choices(space: spaces.Space[Any], value: Any) -> None:
    """Raise ValueError for choices outside a space. `gymnasium.spaces.flatten` counts some of them from the end."""
    one = np.asarray(value).item() if isinstance(space, spaces.Discrete) else None
    if one is not None and not space.start <= one < space.start + space.n:  # type: ignore[attr-defined]
        raise ValueError(f"{one} is none of the choices")
    if isinstance(space, (spaces.MultiDiscrete, spaces.MultiBinary)) and not space.contains(value):
        raise ValueError("not in the space")


def _check_finite(key: str, value: NDArray[Any]) -> None:
    """Raise SimulationError for NaN and infinity."""
    if not (finite := np.isfinite(value)).all():
        raise SimulationError(f"observation {key!r} is not finite ({value[~finite].flat[0]})")


def read_observations(space: spaces.Space[Any]) -> Observations:
    """What becomes of each part of an observation.

    The picture is the first of `PICTURES` in a dict, or the whole observation if it is one. A picture ``goal`` is the goal picture. Boxes
    of one or two dimensions and choices become vectors under their own keys; everything else is left out.

    Raises ConfigError for a picture that cannot be used, with the rule.
    """
    if isinstance(space, spaces.Dict):
        parts: dict[str, spaces.Space[Any]] = dict(space.spaces)
    else:
        image = isinstance(space, spaces.Box) and len(space.shape) == 3
        if image and (problem := picture_problem(space)):
            raise ConfigError(f"its observation cannot be used as a picture: {problem}")
        parts = {PICTURES[0] if image else PLAIN: space}
    picture = next((key for key in PICTURES if key in parts), None)
    if picture and (problem := picture_problem(parts[picture])):
        raise ConfigError(f"observation {picture!r} cannot be used as the picture: {problem}")
    goal = GOAL if GOAL in parts and not picture_problem(parts[GOAL]) else None
    left_out: dict[str, str] = {}
    for key, part in parts.items():
        if key in (picture, goal):
            continue
        if key in TAKEN:
            left_out[key] = "records use this key for something else; rename it to have it recorded"
        elif problem := numbers_problem(part):
            left_out[key] = problem
    numbers = tuple(key for key in parts if key not in (picture, goal) and key not in left_out)
    return Observations(parts, isinstance(space, spaces.Dict), picture, goal, numbers, left_out)


@dataclass(frozen=True)
class Actions:
    """How a method's action, A numbers, is given to the environment."""

    space: spaces.Space[Any]
    count: int
    """A."""

    @property
    def discrete(self) -> bool:
        """Whether it is a one-hot vector that chooses one of A."""
        return isinstance(self.space, spaces.Discrete)

    def box(self) -> spaces.Box:
        """The space of a method's actions: one-hot vectors, or numbers in [-1, 1]."""
        return spaces.Box(0.0 if self.discrete else -1.0, 1.0, (self.count,), np.float32)

    def to_json(self) -> dict[str, Any]:
        """The environment's action space as JSON values, for `actions_of`."""
        space: Any = self.space
        if self.discrete:
            return {"n": self.count, "start": int(space.start)}
        return {"low": space.low.tolist(), "high": space.high.tolist(), "dtype": space.dtype.name}

    def given(self, action: NDArray[np.float64]) -> Any:
        """The environment's action for a method's: the number of the one, or [-1, 1] mapped linearly to the bounds of the box."""
        if isinstance(self.space, spaces.Discrete):
            return self.space.start + self.space.dtype.type(action.argmax())
        box: Any = self.space
        low, high = box.low.astype(np.float64), box.high.astype(np.float64)
        scaled = (low + high) / 2 + (high - low) / 2 * action.reshape(box.shape)
        return np.clip(scaled.astype(box.dtype), box.low, box.high)  # rounding may leave the bounds


def read_actions(space: spaces.Space[Any]) -> Actions:
    """How actions are given. Raises ConfigError, with what to do, for spaces other than Discrete and a bounded Box of floats."""
    if isinstance(space, spaces.Discrete):
        if space.n < 2:
            raise ConfigError("its action space has one action, so there is nothing to choose")
        return Actions(space, int(space.n))
    if not isinstance(space, spaces.Box):
        ways = {
            "MultiDiscrete": "one Discrete space of all combinations",
            "MultiBinary": "one Discrete space of all combinations",
        }
        way = ways.get(type(space).__name__, "one Box or one Discrete space")
        raise ConfigError(f"its action space is {type(space).__name__}, which no method takes; wrap it so that it has {way}")
    if space.dtype.kind != "f":
        raise ConfigError(f"its action space is a Box of {space.dtype}; use floats, or Discrete for choices")
    if not np.prod(space.shape):
        raise ConfigError("its action space has no numbers")
    if not (np.isfinite(space.low).all() and np.isfinite(space.high).all()):
        raise ConfigError(
            "its action space has no bounds, so actions cannot be scaled to it; wrap it, for example as gymnasium.wrappers."
            f"TransformAction(env, lambda a: a, gymnasium.spaces.Box(-1, 1, {space.shape}))"
        )
    return Actions(space, int(np.prod(space.shape)))


def actions_of(values: Any) -> Actions:
    """What `Actions.to_json` wrote. Raises ConfigError for anything else."""
    try:
        if "n" in values:
            n, start = values["n"], values["start"]
            if not all(type(x) is int and abs(x) < 2**31 for x in (n, start)):
                raise ValueError("n and start are not whole numbers")
            return read_actions(spaces.Discrete(n, start=start))
        if values["dtype"] not in ("float16", "float32", "float64"):
            raise ValueError("its type is not a float")
        low, high = (np.array(values[name], values["dtype"]) for name in ("low", "high"))
        return read_actions(spaces.Box(low, high, dtype=low.dtype.type))
    except (TypeError, ValueError, KeyError, AssertionError) as error:
        raise ConfigError(f"action space {values!r:.200} cannot be read ({one_line(error)})") from error


def fit(picture: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """(H, W, 3) as a new (size, size, 3), averaged over areas. Other aspect ratios are squeezed."""
    if picture.shape[:2] == (size, size):
        return picture.copy()
    small = cv2.resize(np.ascontiguousarray(picture), (size, size), interpolation=cv2.INTER_AREA)
    return np.asarray(small, dtype=np.uint8)
