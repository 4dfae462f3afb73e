"""Environments outside the package by name: ids of gymnasium, callables of a user, suites of installed packages.

    gym:CartPole-v1, gym:namespace/Name-v0, gym:module:Name-v0     options go to gymnasium.make
    my_package.my_env:make                                         a callable that returns a gymnasium.Env; options are its arguments
    mysuite:task                                                   an entry point of an installed package; its pyproject.toml has

        [project.entry-points."localmotion.envs"]
        mysuite = "my_package.envs:make"                           make(task, **options) -> gymnasium.Env; make.tasks may list the tasks

Importing runs code, and names also come from files of other people: a run's config.json, a study. So a module is imported only if
`trust_env` was given exactly this name. The command line does that with the names typed there. Ids that gymnasium itself registers, and
entry points, which the user installed, need no trust.
"""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import gymnasium
from gymnasium.envs.registration import EnvSpec, load_env_creator

from localmotion.envs.gym_env import GymEnv
from localmotion.errors import ConfigError, LocalmotionError, unknown_name
from localmotion.foreign import FAULTS, cause, entries, import_named, see_working_folder, trusted_envs

GROUP = "localmotion.envs"
"""Group of the entry points. The name of each is the name of its suite."""
GYM = "gym"
"""The suite of gymnasium's ids."""
KWARGS = "kwargs"
"""Option for arguments of the environment whose names are settings of a run, e.g. {"kwargs": {"size": 5}}."""
Maker = Callable[..., gymnasium.Env[Any, Any]]


@dataclass(frozen=True)
class Own:
    """How an environment outside the package is made."""

    name: str
    make: Maker
    arguments: inspect.Signature | None
    """Its arguments besides the task, if they are known."""

    def check(self, options: Mapping[str, Any]) -> None:
        """Raise ConfigError for options that the environment cannot have. Builds nothing."""
        known = [] if self.arguments is None else list(self.arguments.parameters.values())
        if self.arguments is None or any(given.kind is given.VAR_KEYWORD for given in known):
            return
        for option in self._all(options):
            if option not in [given.name for given in known]:
                raise unknown_name(f"option of {self.name!r:.60}", option[:60], [*(given.name for given in known), "time_limit"])

    def inner(self, options: Mapping[str, Any], time_limit: int | None = None) -> gymnasium.Env[Any, Any]:
        """The gymnasium environment itself. Raises ConfigError if it cannot be made."""
        try:
            found = self.make(self._all(options), time_limit)
        except LocalmotionError:
            raise
        except FAULTS as error:  # whatever somebody's code does
            raise ConfigError(f"{self.name}: making it failed: {cause(error)}") from error
        if not isinstance(found, gymnasium.Env):
            raise ConfigError(f"{self.name}: returned {type(found).__name__}, not a gymnasium.Env")
        return found

    def __call__(
        self,
        task: str,
        *,
        time_limit: int | None = None,
        quality: str = "auto",
        camera: str | int | None = None,
        seed: int = 0,
        size: int = 64,
        percept_size: int | None = None,
        action_repeat: int | None = None,
        **options: Any,
    ) -> GymEnv:
        """The environment with the interface of `make_env`. It draws as it does in any ``quality``; ``camera`` is one of its options."""
        from localmotion.envs.render import QUALITIES

        if quality not in QUALITIES:
            raise unknown_name("rendering quality", quality, QUALITIES)
        inner = self.inner(options if camera is None else {**options, "camera": camera}, time_limit)
        sizes: dict[str, Any] = {"size": size, "percept_size": percept_size, "action_repeat": action_repeat}
        return GymEnv(self.name, inner, seed=seed, time_limit=time_limit, **sizes)

    def _all(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Options with those of `KWARGS`. Raises ConfigError if these are not a mapping."""
        more = options.get(KWARGS, {})
        if not isinstance(more, Mapping):
            raise ConfigError(f"option {KWARGS}={more!r:.60} of {self.name}: must be a mapping of arguments by name")
        return {**{key: value for key, value in options.items() if key != KWARGS}, **more}


def find_own(name: str, suites: Iterable[str]) -> Own:
    """The environment ``name``, whose suite is none of the built-in ``suites``. Trusted modules are imported, nothing is built.

    Raises ConfigError for a name that does not exist, that is not trusted, or that cannot be imported.
    """
    suite, _, task = name.partition(":")
    if suite == GYM:
        return _of_gymnasium(name, task)
    if points := entries(GROUP).get(suite, []):
        told = [f"{point.value} ({point.dist.name if point.dist else 'no package'})" for point in points]
        if len(points) > 1:
            raise ConfigError(f"suite {suite!r} is an entry point of several packages: {', '.join(told)}; uninstall all but one")
        make = _member(points[0].module, points[0].attr, f"suite {suite!r}, entry point {told[0]}")
        if (tasks := getattr(make, "tasks", None)) is not None and task not in tasks:
            raise unknown_name("environment", name[:80], [f"{suite}:{known}" for known in tasks])
        return Own(name, lambda options, _: make(task, **{**_drawn(make), **options}), _arguments(make, skip=1))
    known = [*suites, *entries(GROUP), GYM]
    if name not in trusted_envs() or not task.isidentifier() or not all(part.isidentifier() for part in suite.split(".")):
        unknown = unknown_name("environment suite", suite[:80], known)
        raise ConfigError(f"{unknown} (an environment of your own {_only_if_named(name)})")
    see_working_folder()
    try:
        make = _member(suite, task, f"environment {name}")
    except ConfigError as error:
        near = difflib.get_close_matches(suite, known)
        hint = f"; or did you mean the suite {' or '.join(near)}?" if near else ""
        raise ConfigError(f"{error}{hint}") from error
    return Own(name, lambda options, _: make(**{**_drawn(make), **options}), _arguments(make))


def _of_gymnasium(name: str, task: str) -> Own:
    """An id of gymnasium's registry, with the module to import before it as in gymnasium's own form."""
    module, _, ident = task.rpartition(":")
    if module:
        if name not in trusted_envs():
            raise ConfigError(f"environment {name!r:.120}: module {module!r:.80} {_only_if_named(name)}")
        see_working_folder()
        import_named(module, f"environment {name}")
    spec = gymnasium.registry.get(ident)
    if spec is None:
        unknown = unknown_name("id of gymnasium", ident[:80], gymnasium.registry)
        raise ConfigError(f"{unknown} (an id that a module registers is written gym:MODULE:{ident[:80]})")
    if not _gymnasiums_own(spec) and name not in trusted_envs():
        raise ConfigError(f"environment {name!r:.120}: its code, {spec.entry_point!s:.80}, {_only_if_named(name)}")

    def made(options: Mapping[str, Any], time_limit: int | None) -> gymnasium.Env[Any, Any]:
        creator: Any = load_env_creator(spec.entry_point) if isinstance(spec.entry_point, str) else spec.entry_point
        limit = {} if time_limit is None else {"max_episode_steps": time_limit}
        if not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
            os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame draws to memory; looking for a screen prints an error line
        return gymnasium.make(ident, disable_env_checker=True, **{**_drawn(creator), **limit, **options})

    return Own(name, made, None)


def _drawn(make: Callable[..., Any]) -> dict[str, Any]:
    """The argument that has pictures rendered, if a callable has it and can."""
    modes, arguments = getattr(make, "metadata", {}).get("render_modes"), _arguments(make)
    given = [] if arguments is None else list(arguments.parameters.values())
    named, more = any(x.name == "render_mode" for x in given), any(x.kind is x.VAR_KEYWORD for x in given)
    takes = (named and (modes is None or "rgb_array" in modes)) or (more and "rgb_array" in (modes or ()))
    return {"render_mode": "rgb_array"} if takes else {}


def _gymnasiums_own(spec: EnvSpec) -> bool:
    """Whether gymnasium itself has the environment's code."""
    code = spec.entry_point if isinstance(spec.entry_point, str) else getattr(spec.entry_point, "__module__", "")
    return code.startswith("gymnasium.")


def _only_if_named(name: str) -> str:
    return f"is imported only if you name it: --trust-env {name:.120}, or localmotion.envs.trust_env in Python"


def _member(module: str, attribute: str, who: str) -> Any:
    """A callable of a module. Raises ConfigError if there is none."""
    found = getattr(import_named(module, who), attribute, None)
    if not callable(found):
        reason = "is not callable" if found is not None else "does not exist"
        raise ConfigError(
            f"{who}: {attribute} of module {module} {reason}; name a function or class that returns a gymnasium.Env"
        )
    return found


def _arguments(make: Callable[..., Any], skip: int = 0) -> inspect.Signature | None:
    """Arguments of a callable without the first ``skip``, or None if Python does not know them."""
    try:
        signature = inspect.signature(make)
    except (TypeError, ValueError):
        return None
    return signature.replace(parameters=list(signature.parameters.values())[skip:])
