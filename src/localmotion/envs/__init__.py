"""Environments by name, all with one interface: observations are pictures, actions are normalised. `make_env` makes them all.

MuJoCo is imported only when an environment that needs it is made.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from localmotion.errors import ConfigError, unknown_name
from localmotion.foreign import needs, trust_env, trusted_envs

if TYPE_CHECKING:
    from localmotion.envs.base import Observed, PixelEnv
    from localmotion.envs.own import Own

__all__ = ["check_env", "is_own", "list_envs", "list_options", "make_env", "own_env", "trust_env", "trusted_envs"]


def _dmc() -> tuple[list[str], Callable[..., PixelEnv]]:
    from localmotion.envs.dmc import TASKS, DMCEnv

    return list(TASKS), DMCEnv


def _metaworld() -> tuple[list[str], Callable[..., PixelEnv]]:
    from localmotion.envs.metaworld import TASKS, MetaWorldEnv

    return list(TASKS), MetaWorldEnv


def _dmcr() -> tuple[list[str], Callable[..., PixelEnv]]:
    from localmotion.envs.dmcr import DMCRemasteredEnv

    return _dmc()[0], DMCRemasteredEnv


def _distracting() -> tuple[list[str], Callable[..., PixelEnv]]:
    from localmotion.envs.distracting import DistractingEnv

    return _dmc()[0], DistractingEnv


def _diswm() -> tuple[list[str], Callable[..., PixelEnv]]:
    from localmotion.envs.colours import DisWMEnv

    return _dmc()[0], DisWMEnv


def _masklam() -> tuple[list[str], Callable[..., PixelEnv]]:
    from localmotion.envs.composite import CompositeDMCEnv

    return _dmc()[0], CompositeDMCEnv


def _dmw() -> tuple[list[str], Callable[..., PixelEnv]]:
    from localmotion.envs.composite import CompositeMetaWorldEnv

    return _metaworld()[0], CompositeMetaWorldEnv


def _planar() -> tuple[list[str], Callable[..., PixelEnv]]:
    from localmotion.envs.planar import TASKS, PlanarEnv
    from localmotion.envs.planar_trees import TASKS as TREES

    return [*TASKS, *TREES], PlanarEnv


def _toy() -> tuple[list[str], Callable[..., PixelEnv]]:
    from localmotion.envs.toy import TASKS, make_toy

    return list(TASKS), make_toy


_SUITES: dict[str, Callable[[], tuple[list[str], Callable[..., PixelEnv]]]] = {
    "dmc": _dmc,
    "dmcr": _dmcr,
    "distracting": _distracting,
    "diswm": _diswm,
    "masklam": _masklam,
    "metaworld": _metaworld,
    "dmw": _dmw,
    "planar": _planar,
    "toy": _toy,
}


_CONTROL = ("dmc", "mujoco", "dm_control")
NEEDS = dict.fromkeys(("dmc", "dmcr", "distracting", "diswm", "masklam", "planar"), _CONTROL)
NEEDS |= dict.fromkeys(("metaworld", "dmw"), ("metaworld", "mujoco", "metaworld"))
"""For each suite of a simulator the extra of this package that installs it, and its packages."""


def _unlisted(suite: str) -> tuple[str, ...]:
    """Tasks that exist but are not listed: bodies that are kept for a pre-registered test."""
    if suite != "planar":
        return ()
    from localmotion.envs.planar_trees import SEALED_TASKS

    return SEALED_TASKS


OWN_DRAWING = {"planar", "toy"}
"""Suites that draw their own pictures: they have no cameras and one quality, "exact"."""


def is_own(name: str) -> bool:
    """Whether a name is that of an environment outside the package (`localmotion.envs.own`)."""
    suite, colon, _ = name.partition(":")
    return bool(colon) and suite not in _SUITES


def own_env(name: str) -> Own:
    """An environment outside the package, to be made. Builds nothing. Raises ConfigError for a name that is wrong or not trusted."""
    from localmotion.envs.own import find_own

    return find_own(name, _SUITES)


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
    supersample: int = 1,
    observed: Observed = "pixels",
    goal: bool = False,
    **options: Any,
) -> PixelEnv:
    """Make an environment; its interface is that of `localmotion.envs.base.PixelEnv`.

    Args:
        name: "dmc:walker_walk", "metaworld:reach" (or "metaworld:reach-v3"), "planar:walker_walk", "toy:dot";
            `list_envs` has all. Or one of your own: "gym:CartPole-v1", "my_module:make" (docs/own_environments.md).
        seed: seed of the environment's own generator, used by resets without a seed.
        size: side of the ``image`` observation in pixels.
        percept_size: side of the ``percept`` observation, a multiple of ``size``: one rendering serves both.
        action_repeat: env steps per call of ``step``; None for the suite's (DMC and planar 2, Meta-World 1, toy 1).
        time_limit: env steps per episode; None for the suite's (DMC and planar 1000, Meta-World 500, toy 50).
        quality: "reference" (MuJoCo's own drawing), "fast" (see `localmotion.envs.render`), "auto": fast on software OpenGL.
        camera: name or number; None for the suite's (DMC 0, quadruped 2, dog_fetch "y-axis"; Meta-World "corner").
        supersample: 2 draws observations at twice their side and averages, i.e. four samples a pixel, in either quality: slow motion is
            found much better (docs/perception.md), for 2 to 5 ms more per frame.
        observed: "pixels", "vectors" (the suite's own low-dimensional observation; no rendering), or "both".
        goal: observations also have ``goal``, a picture of the episode's task solved (docs/environments.md).
        options: the suite's own options by name, e.g. ``difficulty="easy"`` of distracting; `list_options` has them. Those of an
            environment of your own are its arguments.

    Raises:
        ConfigError: a name that does not exist (the message suggests the nearest ones) or is not trusted (`trust_env`), an option the
            suite lacks, or a setting out of range; ``goal`` for an environment without goal pictures.
        EnvError: no working OpenGL; the message says what to install.
        MissingExtraError: the suite's simulator is not installed.
    """
    task, factory = _found(name)
    suite = name.partition(":")[0]
    if suite in NEEDS:
        needs(*NEEDS[suite], who=name)
    _check_options(name, factory, options)
    if not 1 <= supersample <= 4 or supersample * (percept_size or size) > 1024:
        raise ConfigError(f"supersample={supersample} of {name} must be 1..4, and pictures are drawn at no more than 1024 pixels")
    if supersample > 1 and is_own(name):
        raise ConfigError(f"supersample={supersample} of {name}: its pictures are as large as it draws them; leave it out")
    env = factory(
        task,
        seed=seed,
        size=size,
        percept_size=percept_size,
        action_repeat=action_repeat,
        time_limit=time_limit,
        quality=quality,
        camera=camera,
        **options,
    )
    env.supersample = supersample
    env.show(observed)
    if goal:
        env.show_goal()
    return env


SETTINGS = {
    "name": "--env",
    "seed": "--seed",
    "quality": "--quality",
    "action_repeat": "--action_repeat",
    "supersample": "--supersample",
    "observed": "--observed",
    "goal": "the method (Method.wants)",
    "size": "the recipe of the clip store (extract --size)",
    "percept_size": "the recipe of the clip store (extract --percept-size)",
}
"""Arguments of `make_env` that are not options of a run, and the setting of a run for each."""


def check_env(name: str, options: Mapping[str, Any]) -> None:
    """Raise ConfigError for an environment that does not exist or an option that it does not have. Builds nothing.

    Options are those of the suite (`list_options`), ``time_limit`` (env steps) and, where the suite has cameras, ``camera`` (name or
    number). Used when a run starts, when a run is loaded, and for a study.
    """
    task, factory = _found(name)
    own, suite = dict(options), name.partition(":")[0]
    cameras = suite not in OWN_DRAWING and not is_own(name)
    if "time_limit" in own:
        limit = own.pop("time_limit")
        if type(limit) is not int or not 1 <= limit < 2**31:
            raise ConfigError(f"option time_limit={limit!r:.60} of {name}: must be a whole number of env steps, 1 or more")
    if "camera" in own and cameras:
        camera = own.pop("camera")
        if type(camera) not in (int, str):
            raise ConfigError(f"option camera={camera!r:.60} of {name}: must be a name or a number")
    _check_options(name, factory, own)
    if check_task := getattr(factory, "check_task", None):
        check_task(task, own)


def _found(name: str) -> tuple[str, Callable[..., PixelEnv]]:
    """Task and maker of an environment. Raises ConfigError for a name that does not exist."""
    suite, colon, task = name.partition(":")
    if not colon:
        import gymnasium

        near = [full for full in list_envs() if full.partition(":")[2].removesuffix("-v3") == name.removesuffix("-v3")]
        near += [f"gym:{name}"] if name in gymnasium.registry else []
        hint = f"; did you mean {' or '.join(near)}?" if near else ", as in dmc:walker_walk, metaworld:reach or toy:dot"
        raise ConfigError(f"environment {name!r} has no suite before its name{hint}")
    if suite not in _SUITES:
        return task, own_env(name)
    tasks, factory = _SUITES[suite]()
    if task.removesuffix("-v3") not in tasks and task not in _unlisted(suite):
        raise unknown_name("environment", name, [f"{suite}:{known}" for known in tasks])
    return task, factory


def list_options(suite: str) -> list[str]:
    """Names of a suite's own options, in addition to those of `make_env`. Raises ConfigError for an unknown suite."""
    if suite not in _SUITES:
        raise unknown_name("environment suite", suite, _SUITES)
    return _options_of(_SUITES[suite]()[1])


def _options_of(factory: Callable[..., PixelEnv]) -> list[str]:
    if declared := getattr(factory, "OPTIONS", None):  # shared by several suites, see `composite.Painted`
        return list(declared)
    common = inspect.signature(make_env).parameters
    kinds = inspect.signature(factory).parameters.values()
    return [given.name for given in kinds if given.kind is given.KEYWORD_ONLY and given.name not in common]


def _check_options(env: str, factory: Callable[..., PixelEnv], options: Mapping[str, Any]) -> None:
    """Raise ConfigError for a name that is not one of the suite's own options."""
    suite, own = env.partition(":")[0], getattr(factory, "check", None)
    known = [] if own else _options_of(factory)
    common = ["time_limit"] if suite in OWN_DRAWING else ["time_limit", "camera"]
    for name in options:
        if name in SETTINGS:
            way = '; an argument of this name is given as {"kwargs": {...}}' if own else ""
            raise ConfigError(f"option {name}={options[name]!r:.60} of {env}: it is set by {SETTINGS[name]}{way}")
        if own:
            continue
        if name == "camera":
            raise ConfigError(f"option camera={options[name]!r:.60} of {env}: {suite} has no cameras; leave it out")
        if not known:
            raise ConfigError(
                f"option {name:.60}={options[name]!r:.60} of {env}: {suite} has no options but {' and '.join(common)}; leave it out"
            )
        if name not in known:
            raise unknown_name(f"option of {env!r:.60}", name[:60], [*known, *common])
    if own:
        own(options)
