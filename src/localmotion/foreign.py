"""Code outside the package, which the user names or installs: imports with errors on one line, extras, entry points, trust in environments.

Importing runs code. No name out of a file gets here, unless the user has named the same.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import traceback
from contextlib import suppress
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any

from localmotion.errors import ConfigError, MissingExtraError
from localmotion.files import one_line

_trusted: list[str] = []
FAULTS = (Exception, SystemExit)
"""What somebody's code raises when it fails. A call of sys.exit would end the program without a word. KeyboardInterrupt is the user's."""


def trust_env(name: str) -> None:
    """Let the environment of exactly this name be imported in this process. For names that the user typed, never for those of a file."""
    if name and name not in _trusted:
        _trusted.append(name)


def trusted_envs() -> tuple[str, ...]:
    """The names that `trust_env` was given, for code that starts further processes of this program."""
    return tuple(_trusted)


def needs(extra: str, *packages: str, who: str) -> None:
    """Raise MissingExtraError, with the command that installs ``extra``, unless its packages are installed. Imports nothing."""
    for package in packages:
        try:
            found = importlib.util.find_spec(package)
        except ValueError:  # a module without a specification
            found = None
        if found is None:
            raise MissingExtraError(f"{who}: needs {package}, which is not installed; run: pip install 'localmotion[{extra}]'")


def import_named(module: str, who: str) -> ModuleType:
    """The module; ``who`` names it in errors. Raises ConfigError, with the fix, if it is not there or its import fails."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise ConfigError(f"{who}: importing {module} failed: {one_line(error)}; install what it needs") from error
        raise ConfigError(
            f"{who}: there is no module {error.name!r}; run the command in the folder that has it, add that folder to PYTHONPATH, or"
            " install its package"
        ) from error
    except FAULTS as error:  # whatever a module does when it is imported
        raise ConfigError(f"{who}: importing {module} failed: {cause(error)}; fix the module") from error


def shut(env: Any) -> None:
    """Close an environment that is given up. An error meanwhile adds no information."""
    with suppress(*FAULTS):
        env.close()


def cause(error: BaseException) -> str:
    """An error of somebody's code on one line, with the place where it was raised."""
    at = traceback.extract_tb(error.__traceback__)[-1]
    if isinstance(error, SystemExit):
        text = f"it called sys.exit({'' if error.code is None else one_line(repr(error.code))})"
    else:
        text = f"{type(error).__name__}: {one_line(error)}"
    return f"{text} ({at.filename}, line {at.lineno})"


def entries(group: str) -> dict[str, list[EntryPoint]]:
    """Entry points of installed packages by name; nothing is imported. A name has several where packages disagree."""
    found: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=group):
        if all(point.value != other.value for other in found.setdefault(point.name, [])):
            found[point.name].append(point)
    return found


def see_working_folder() -> None:
    """Let the folder that a command runs in be looked through for modules, after all others, as `python -m` does first."""
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())
