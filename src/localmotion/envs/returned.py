"""What `reset` and `step` of a user's environment return. What breaks gymnasium's API is an EnvError with the cause and the fix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from localmotion.errors import EnvError, SimulationError
from localmotion.files import one_line

RESET = ("observation", "info")
STEP = ("observation", "reward", "terminated", "truncated", "info")


def said(value: Any) -> str:
    """A value in a few words."""
    if isinstance(value, np.ndarray):
        return f"an array of shape {value.shape}"
    if value is None or isinstance(value, (bool, int, float, str, np.generic)):
        return one_line(repr(value), 60)
    return f"a {type(value).__name__}"


def values(call: str, found: Any, names: tuple[str, ...]) -> tuple[Any, ...]:
    """The values of a call by position. Raises EnvError if it returned another number of values."""
    if isinstance(found, (tuple, list)) and len(found) == len(names):
        return tuple(found)
    what = f"{len(found)} values" if isinstance(found, tuple) else said(found)
    old = ""
    if call == "step" and isinstance(found, tuple) and len(found) == len(names) - 1:
        old = " (gym's old API had 4: split done into terminated, an end of the task, and truncated, a cut)"
    raise EnvError(f"{call}() returned {what}; gymnasium's API has {len(names)}: {', '.join(names)}{old}")


def number(what: str, value: Any) -> float:
    """A value as a number. An array of one number is one. Raises EnvError for anything else."""
    one = value.item() if isinstance(value, np.ndarray) and value.size == 1 else value
    if not isinstance(one, (str, bytes)):
        try:
            return float(one)
        except (TypeError, ValueError):
            pass
    raise EnvError(f"{what} is {said(value)}; a number is needed")


def flag(what: str, value: Any) -> bool:
    """A value as True or False. Raises EnvError for a dict, a text or several values."""
    if not isinstance(value, (str, bytes, Mapping)):
        try:
            return bool(value)
        except (TypeError, ValueError):
            pass
    raise EnvError(f"{what} is {said(value)}; True or False is needed")


def mapping(what: str, value: Any) -> Mapping[str, Any]:
    """A value that is a dict. Raises EnvError for anything else."""
    if not isinstance(value, Mapping):
        raise EnvError(f"{what} is {said(value)}; a dict is needed, an empty one if there is nothing to say")
    return value


def finite_reward(name: str, reward: float) -> None:
    """Raise SimulationError if the reward of the environment ``name`` is NaN or infinite."""
    if not np.isfinite(reward):
        raise SimulationError(f"{name}: reward {reward} is not finite; the simulation has diverged")
