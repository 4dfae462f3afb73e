"""Import a module that the user named, with errors on one line. For names that the user typed or installed, never for those of a file."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from types import ModuleType

from localmotion.errors import ConfigError
from localmotion.files import one_line


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
    except Exception as error:  # whatever a module does when it is imported
        raise ConfigError(f"{who}: importing {module} failed: {cause(error)}; fix the module") from error


def cause(error: Exception) -> str:
    """An error of somebody's code on one line, with the place where it was raised."""
    at = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {one_line(error)} ({at.filename}, line {at.lineno})"


def see_working_folder() -> None:
    """Let the folder that a command runs in be looked through for modules, after all others, as `python -m` does first."""
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())
