"""Engines that run commands of `localmotion` side by side: on this machine, as jobs of a cluster, or as tasks of Ray.

An engine knows commands only (`launch.work.Command`), so everything that has a resumable command can be launched: the runs of
a study, the parts of an extraction. Its package is imported when the engine is made.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from localmotion.errors import ConfigError, unknown_name
from localmotion.foreign import needs
from localmotion.launch.work import Command, Engine, Outcome, carry_out

__all__ = ["ENGINES", "Command", "Engine", "Launch", "Outcome", "carry_out", "launch_options"]

ENGINES: Mapping[str, str] = {"local": "", "submitit": "cluster", "ray": "ray"}
"""Engines, and the extra that each needs. The package and the module here have the engine's name."""


class Launch(NamedTuple):
    """What a command line says about how to launch its work."""

    name: str = "local"
    """An engine of `ENGINES`."""
    jobs: int = 0
    """Most commands at a time. 0: with ``local`` one for each core, else no limit."""
    pack: int = 1
    """Commands of one job, which run side by side in it."""
    options: Mapping[str, Any] = {}
    """Settings of the engine: docs/scale.md."""

    def check(self) -> None:
        """Raise ConfigError for an unknown engine and for settings that it does not have, MissingExtraError without its package."""
        if self.name not in ENGINES:
            raise unknown_name("engine", self.name, ENGINES)
        if self.jobs < 0 or self.pack < 1:
            raise ConfigError("--jobs takes 0 or more, and --pack 1 or more")
        if not ENGINES[self.name]:
            if self.options or self.pack > 1:
                raise ConfigError(
                    f"--launch {self.name}: has no jobs to pack and no options; leave out --pack and --launch-option"
                )
            return
        needs(ENGINES[self.name], self.name, who=f"--launch {self.name}")

    def engine(self, folder: Path) -> Engine:
        """The engine. It keeps its files in ``folder``. Raises as `check`, and ConfigError if the engine refuses its options."""
        self.check()
        make: Callable[[Path, Launch], Engine]
        if self.name == "submitit":
            from localmotion.launch.submitit import make
        elif self.name == "ray":
            from localmotion.launch.ray import make
        else:
            from localmotion.launch.local import make
        return make(folder.resolve(), self)


def launch_options(texts: Sequence[str]) -> dict[str, Any]:
    """Options from ``NAME=VALUE`` texts. A value that is JSON is read as JSON, and as text otherwise. Raises ConfigError for others."""
    found: dict[str, Any] = {}
    for text in texts:
        name, given, value = text.partition("=")
        if not name or not given:
            raise ConfigError(f"--launch-option {text!r}: write it as NAME=VALUE, e.g. --launch-option slurm_partition=gpu")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found
