"""Environments by name, all with one interface: pictures in, normalised actions out. `make_env` is the one door.

MuJoCo is imported only when an environment that needs it is made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from localmotion.errors import ConfigError, unknown_name

if TYPE_CHECKING:
    from localmotion.envs.base import PixelEnv

__all__ = ["list_envs", "make_env"]


def _dmc() -> tuple[list[str], Callable[..., PixelEnv]]:
    from localmotion.envs.dmc import TASKS, DMCEnv

    return list(TASKS), DMCEnv


def _metaworld() -> tuple[list[str], Callable[..., PixelEnv]]:
    from localmotion.envs.metaworld import TASKS, MetaWorldEnv

    return list(TASKS), MetaWorldEnv


def _toy() -> tuple[list[str], Callable[..., PixelEnv]]:
    from localmotion.envs.toy import TASKS, make_toy

    return list(TASKS), make_toy


_SUITES: dict[str, Callable[[], tuple[list[str], Callable[..., PixelEnv]]]] = {
    "dmc": _dmc,
    "metaworld": _metaworld,
    "toy": _toy,
}


def list_envs(suite: str | None = None) -> list[str]:
    """Full names of all environments, or of one suite's. Raises ConfigError for an unknown suite."""
    if suite is not None and suite not in _SUITES:
        raise unknown_name("environment suite", suite, _SUITES)
    return [f"{name}:{task}" for name, find in _SUITES.items() if suite in (None, name) for task in find()[0]]


def make_env(
    name: str,
    *,
    seed: int = 0,
    size: int = 64,
    percept_size: int | None = None,
    action_repeat: int | None = None,
    time_limit: int | None = None,
    quality: Literal["fast", "reference", "auto"] = "auto",
    camera: str | int | None = None,
) -> PixelEnv:
    """Make an environment; its interface is that of `localmotion.envs.base.PixelEnv`.

    Args:
        name: "dmc:walker_walk", "metaworld:reach" (or "metaworld:reach-v3"), "toy:dot"; `list_envs` has all.
        seed: seed of the environment's own generator, used by resets without a seed.
        size: side of the ``image`` observation in pixels.
        percept_size: side of the ``percept`` observation, a multiple of ``size``: one rendering serves both.
        action_repeat: env steps per call of ``step``; None for the suite's (DMC 2, Meta-World 1, toy 1).
        time_limit: env steps per episode; None for the suite's (DMC 1000, Meta-World 500, toy 50).
        quality: "reference" (MuJoCo's own drawing), "fast" (see `localmotion.envs.render`), "auto": fast on software OpenGL.
        camera: name or number; None for the suite's (DMC 0, quadruped 2; Meta-World "corner").

    Raises:
        ConfigError: a name that does not exist (the nearest ones are named) or a setting out of range.
        EnvError: no OpenGL can draw here; the message says what to install.
    """
    suite, colon, task = name.partition(":")
    if not colon:
        near = [full for full in list_envs() if full.partition(":")[2].removesuffix("-v3") == name.removesuffix("-v3")]
        hint = f"; did you mean {' or '.join(near)}?" if near else ", as in dmc:walker_walk, metaworld:reach or toy:dot"
        raise ConfigError(f"environment {name!r} has no suite before its name{hint}")
    if suite not in _SUITES:
        raise unknown_name("environment suite", suite, _SUITES)
    tasks, factory = _SUITES[suite]()
    if task.removesuffix("-v3") not in tasks:
        raise unknown_name("environment", name, [f"{suite}:{known}" for known in tasks])
    return factory(
        task,
        seed=seed,
        size=size,
        percept_size=percept_size,
        action_repeat=action_repeat,
        time_limit=time_limit,
        quality=quality,
        camera=camera,
    )
